#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource and waits until it is there:
#
#   tpu_scripts/create.sh [--dry-run] NAME ZONE TYPE [OPTION ...]
#   tpu_scripts/create.sh my-pod us-west4-a v5litepod-16 --spot
#
# TYPE is an accelerator type (v5litepod-8, v5litepod-16, v5p-32, v6e-16); further options go to gcloud.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
usage 3
name=${arguments[0]} zone=${arguments[1]} type=${arguments[2]}

case "$type" in
    v5lite*) version=v2-alpha-tpuv5-lite ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v6e*) version=v2-alpha-tpuv6e ;;
    *) echo "error: unknown TYPE $type: give one such as v5litepod-16, v5p-32 or v6e-16" >&2; exit 2 ;;
esac
step gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type "$type" --runtime-version "$version" "${arguments[@]:3}"
state=""
until [[ -n "$dry" || "$state" == ACTIVE ]]; do
    sleep 20
    state=$(gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)')
    echo "$name: $state"
    if [[ "$state" =~ ^(FAILED|SUSPEND|DELET) ]]; then
        echo "error: $name is $state: tpu_scripts/delete.sh $name $zone, and ask again" >&2
        exit 1
    fi
done
