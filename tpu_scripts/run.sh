#!/usr/bin/env bash
# Runs a command of this project on an existing single-host TPU VM (for example a v5litepod-8):
#
#   tpu_scripts/run.sh [--dry-run] NAME ZONE python -m train.lora --placement task_diff --out runs/tpu
#
# Copies the checkout, installs it with the TPU extra, runs the command there and copies runs/ back.
set -euo pipefail

dry=""
if [[ "${1:-}" == "--dry-run" ]]; then dry=echo; shift; fi
if (( $# < 3 )); then sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
name=$1 zone=$2; shift 2

root=$(cd "$(dirname "$0")/.." && pwd)
ssh=(gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --command)
copy=(gcloud compute tpus tpu-vm scp --recurse --zone "$zone")

archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format tar.gz HEAD > "$archive"
$dry "${copy[@]}" "$archive" "$name:vlm-jax.tar.gz"
$dry "${ssh[@]}" "rm -rf vlm-jax && mkdir vlm-jax && tar -xzf vlm-jax.tar.gz -C vlm-jax"
$dry "${ssh[@]}" "cd vlm-jax && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
$dry "${ssh[@]}" "cd vlm-jax && PATH=\$PWD/.venv/bin:\$PATH $(printf '%q ' "$@")"
$dry "${copy[@]}" "$name:vlm-jax/runs" "$root"
