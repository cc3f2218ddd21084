#!/usr/bin/env bash
# P0's Table 1 for Qwen3-VL-4B on a slice: traces, placements, LoRA and held-out accuracy on the paper's datasets.
#
#   BUCKET=my-bucket tpu_scripts/table1.sh [--dry-run] NAME ZONE MESH
#   BUCKET=my-bucket tpu_scripts/table1.sh my-pod us-west4-a fsdp=8,tensor=2      (v5litepod-16: docs/pods.md)
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
usage 3
out=../bucket/runs/table1
[[ -n "${BUCKET:-}" ]] || out=runs/table1
exec "$(dirname "$0")/run.sh" ${dry:+--dry-run} "${arguments[0]}" "${arguments[1]}" \
    python -m train.study --recipe p0 --models Qwen/Qwen3-VL-4B-Instruct --families p0-knowledge p0-perception \
    --mesh "${arguments[2]}" --batch 16 --accumulation 1 --out "$out"
