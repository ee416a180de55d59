#!/usr/bin/env bash
# Correctness on the GPU, then the registry, in under ten minutes on one GPU. It needs this
# repository and a python with torch and triton; it installs nothing and fetches nothing. The C++
# and CUDA extensions are built in place where nvcc, a C++ compiler and pybind11 are found.
#
#   benchmarks/gpu.sh [large | sanitize] [--dry-run]
#
# large: instead of all that, teachers and students of 8 and 32 billion parameters, with bitsandbytes
# and, where they are there, peft and TRL. sanitize: the checks of small shapes under
# compute-sanitizer, which must be there.
#
# PYTHON  the interpreter (python3)      OUT  the folder for results (benchmarks/results)
# COMMIT  what the rows record where git cannot say
#
# A step that fails or runs out of time does not stop the next one: device time is scarce, and the
# registry has a gate of its own. The exit status is 1 if any of them failed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

dry=false what=all
for word in "$@"; do
    case $word in
        large | sanitize) what=$word ;;
        --dry-run) dry=true ;;
        *) echo "usage: benchmarks/gpu.sh [large | sanitize] [--dry-run]" >&2; exit 2 ;;
    esac
done

status=0
if ! $dry; then
    mkdir -p "$out"
    exec 3>&1 > >(tee "$out/gpu.log" >&3) 2>&1
    log=$!
fi

# step SECONDS NAME COMMAND...
step() {
    local limit=$1 name=$2 code=0
    shift 2
    echo "== $name, at most $limit s: $*"
    if $dry; then return; fi
    local started=$SECONDS
    timeout --kill-after=5 "$limit" "$@" || code=$?
    case $code in
        0) ;;
        124 | 137) echo "!! $name was stopped after $limit s"; status=1 ;;
        *) echo "!! $name failed with exit code $code"; status=1 ;;
    esac
    echo "== $name took $((SECONDS - started)) s"
}

# The project's pytest settings ask for plugins that an image need not have.
if "$python" -c "import pytest" 2>/dev/null; then
    tests=("$python" -m pytest -c /dev/null --rootdir "$PWD" -p no:cacheprovider -q)
else
    echo "no pytest here: tests/test_gpu.py runs as a script"
    tests=("$python")
fi
commit=()
if [[ -n ${COMMIT:-} ]]; then commit=(--commit "$COMMIT"); fi

step 15 machine nvidia-smi
step 30 versions "$python" -c "
import torch
from fastdistill.backend import describe
print(torch.version.cuda, describe())"
step 60 build "$python" setup.py -q build_ext --inplace
if [[ $what == sanitize ]]; then
    small=(near_convergence primitive_scores_and_topk dense_teacher filtered
        rows_are_rounded_alike every_compute_against_fp64)
    step 480 sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" tests/test_gpu.py "${small[@]}"
elif [[ $what == large ]]; then
    step 170 'large teachers' "$python" -m benchmarks large_teacher --out "$out" "${commit[@]}"
    step 310 'large students' "$python" -m benchmarks large_student --out "$out" "${commit[@]}"
else
    step 150 correctness "${tests[@]}" tests/test_gpu.py
    step 60 'gradient error' "$python" -m benchmarks gradient_error tile_skipping --out "$out" \
        "${commit[@]}"
    step 60 'quantised layers' "$python" -m benchmarks quantized_gpu --repeats 5 \
        --budget-seconds 45 --out "$out" "${commit[@]}"
    step 45 'a training step' "$python" -m benchmarks train_step --out "$out" "${commit[@]}"
    step 145 registry "$python" -m benchmarks heads --repeats 5 --budget-seconds 105 --out "$out" \
        "${commit[@]}"
fi

if ! $dry; then
    exec 1>&- 2>&-
    wait "$log"  # it writes the last lines
fi
exit "$status"
