#!/usr/bin/env bash
# Gives a slice back that create.sh asked for, whatever state it is in:
#
#   tpu_scripts/delete.sh [--dry-run] NAME ZONE
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
usage 2
step gcloud compute tpus queued-resources delete "${arguments[0]}" --zone "${arguments[1]}" --force --quiet
