#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: builds, tests, sanitizers, kernels, whole steps.
#
#     benchmarks/run_gpu.sh OUT
#
# Uses the python3 (or $PYTHON), torch and nvcc that are there and fetches nothing. Writes OUT/PART.json with
# device, versions and commit for each part, and OUT/log.txt. A part that fails or runs out of time is recorded
# and the next one starts. Exit status: 0 if all parts passed, 1 if one failed, 2 if they could not start.
set -uo pipefail
exec < /dev/null

PYTHON=${PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin # nvcc and compute-sanitizer, where nobody put them on the path

stop() {
    echo "run_gpu.sh: error: $1" >&2
    exit 2
}

[ $# -eq 1 ] || stop "expected one argument, the folder for the results: benchmarks/run_gpu.sh OUT"
mkdir -p "$1" || stop "the folder $1 cannot be made; choose another"
out=$(realpath "$1")
cd "$(dirname "$0")/.." || stop "the repository cannot be entered"
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2> /dev/null ||
    stop "$PYTHON has no torch that sees a CUDA device; run this on a machine with one, or set PYTHON"
: > "$out/log.txt"
failed=()

# part NAME SECONDS COMMAND...: the command, which may also use the time that earlier parts left over.
due=0
part() {
    local name=$1
    due=$((due + $2))
    local limit=$((due > SECONDS ? due - SECONDS : 0))
    shift 2
    printf '== %s (at %d s, limit %d s)\n' "$name" "$SECONDS" "$limit"
    "$PYTHON" -m benchmarks.part "$out" "$name" "$limit" "$@" && return
    failed+=("$name")
    tail -n 20 "$out/log.txt"
}

bench=("$PYTHON" -m pytest --benchmark-only --device cuda --benchmark-json "{json}" -p no:cacheprovider)
install=("$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .)
workers=()
"$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 8)
op_benchmarks=()
step_benchmarks=()
slow_benchmarks=(benchmarks/bench_end_to_end.py benchmarks/bench_scaling.py) # torch.compile, many sizes
for file in benchmarks/bench_*.py; do
    stem=${file#benchmarks/bench_}
    if [ "$stem" = bandwidth.py ] || [[ " ${slow_benchmarks[*]} " = *" $file "* ]]; then continue; fi
    if [ -e "cdm_fast/ops/$stem" ]; then op_benchmarks+=("$file"); else step_benchmarks+=("$file"); fi
done

part build 120 env CDM_FAST_REQUIRE_EXT=1 "${install[@]}"
# Without the extension the Triton kernels are still worth a look.
if [ ${#failed[@]} -gt 0 ]; then CDM_FAST_NO_EXT=1 "${install[@]}"; fi
part doctor 15 "$PYTHON" -c 'import json, sys; from cdm_fast import doctor
json.dump(doctor.report(), open(sys.argv[1], "w"))' "{json}"
part tests 85 "$PYTHON" -m pytest tests/ops tests/test_gpu.py --test-device cuda "${workers[@]}" \
    -p no:cacheprovider
# Only the kernels of this project are instrumented (their names hold its namespace, cdm). Without PyTorch's
# cache every tensor is an allocation of its own, and an access past its end is seen.
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 1 --kernel-regex kns=cdm "$PYTHON" -m benchmarks.sanitize_kernels cuda
    done
else
    echo "no compute-sanitizer on the PATH: memcheck and racecheck are left out"
fi
part bandwidth 60 "${bench[@]}" benchmarks/bench_bandwidth.py
part kernels 40 "${bench[@]}" --rounds 7 "${op_benchmarks[@]}"
part steps 90 "${bench[@]}" --deselect benchmarks/bench_train_step.py::test_compiled "${step_benchmarks[@]}"
part compiled 70 "${bench[@]}" benchmarks/bench_train_step.py -k compiled
part whole 30 "${bench[@]}" "${slow_benchmarks[@]}"

printf '== done in %d s\n' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see $out/log.txt)"
    exit 1
fi
