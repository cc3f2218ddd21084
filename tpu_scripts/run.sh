#!/usr/bin/env bash
# Runs a command of this project on all hosts of a slice, as one job:
#
#   tpu_scripts/run.sh [--dry-run] NAME ZONE python -m train.lora --placement task_diff --out OUT
#
# Copies the last commit to every host, installs it with the TPU extra, and starts the command on all of them with
# --processes auto. With BUCKET=name (no gs://) the bucket is mounted on every host beside the checkout, programs that one
# job compiled are kept in it for the next, and runs should go there (--out ../bucket/runs/...): several hosts need a
# folder that all of them see. Without it, which is enough for one host, runs/ is copied back. A preempted job goes on
# when the same line is run again. COMMAND is one that knows --processes: they that run a model.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
usage 3
name=${arguments[0]} zone=${arguments[1]}
command=("${arguments[@]:2}" --processes auto)

root=$(cd "$(dirname "$0")/.." && pwd)
on_all() { step gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

archive=$(mktemp -d)/vlm-jax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
git -C "$root" archive --format tar.gz --output "$archive" HEAD
step gcloud compute tpus tpu-vm scp "$archive" "$name:vlm-jax.tar.gz" --zone "$zone" --worker all
keep="! -name runs ! -name .venv"
on_all "mkdir -p vlm-jax && find vlm-jax -mindepth 1 -maxdepth 1 $keep -exec rm -rf {} + && tar -xzf vlm-jax.tar.gz -C vlm-jax"
on_all "cd vlm-jax && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
variables="PATH=\$PWD/.venv/bin:\$PATH"
if [[ -n "${BUCKET:-}" ]]; then
    on_all "mkdir -p bucket && (mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit 100000 $BUCKET bucket)"
    variables+=" JAX_COMPILATION_CACHE_DIR=gs://$BUCKET/compiled"
fi
on_all "cd vlm-jax && $variables $(printf '%q ' "${command[@]}")"
if [[ -z "${BUCKET:-}" ]]; then
    step gcloud compute tpus tpu-vm scp --recurse "$name:vlm-jax/runs" "$root" --zone "$zone" --worker 0
fi
