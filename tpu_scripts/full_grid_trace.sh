#!/usr/bin/env bash
# Traces every layer's attention and MLP of a model on one of the paper's tasks, on a slice.
#
#   BUCKET=my-bucket tpu_scripts/full_grid_trace.sh [--dry-run] NAME ZONE MESH [MODEL] [TASK]
#   BUCKET=my-bucket tpu_scripts/full_grid_trace.sh my-pod us-west4-a data=8,tensor=2
#
# MODEL is Qwen/Qwen3-VL-4B-Instruct and TASK docvqa where nothing else is said.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
usage 3
task=${arguments[4]:-docvqa}
out=../bucket/runs/trace-$task
[[ -n "${BUCKET:-}" ]] || out=runs/trace-$task
exec "$(dirname "$0")/run.sh" ${dry:+--dry-run} "${arguments[0]}" "${arguments[1]}" \
    python -m interventions.trace --model "${arguments[3]:-Qwen/Qwen3-VL-4B-Instruct}" --task "$task" \
    --limit 1000 --trace-batch 16 --mesh "${arguments[2]}" --out "$out"
