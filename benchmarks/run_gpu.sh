#!/usr/bin/env bash
# Everything that needs a GPU, in one call of about six minutes: builds, tests, sanitizer, kernels, whole steps.
#
#     benchmarks/run_gpu.sh [OUT] [--limit SECONDS] [--only STAGE,STAGE...] [--dry-run]
#
# Writes OUT/results.json and OUT/log.txt, stage by stage; `benchmarks/run_gpu.sh --help` tells the rest. Uses
# the python3 (or $PYTHON), torch and nvcc that are there, and fetches nothing.
set -euo pipefail
exec < /dev/null
out_base=$PWD
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.support.gpu_run --relative-to "$out_base" "$@"
