#!/usr/bin/env bash
# Checks and measures the kernels on one GPU in under ten minutes. It needs this repository and a
# Python with torch and triton; it installs and downloads nothing. The C++ and CUDA extensions are
# built in place where nvcc, a C++ compiler and pybind11 are present.
#
#   benchmarks/gpu.sh [large | sanitize] [--dry-run]
#   benchmarks/gpu.sh --wheels
#
# large: instead, teachers and students of 8 and 32 billion parameters. sanitize: the checks of small
# shapes under compute-sanitizer. --wheels: the packages that are missing here, and how to bring them.
#
# PYTHON  the interpreter (python3)      OUT  the folder of results (benchmarks/results)
# COMMIT  the commit that the rows record where git cannot tell it
#
# benchmarks/gpu_steps.py has the steps and their limits. A step that fails or is stopped does not
# stop the next one; the exit status is then 1.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-benchmarks/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
run=("${PYTHON:-python3}" -m benchmarks.gpu_steps --out "$out" ${COMMIT:+--commit "$COMMIT"} "$@")
case " $* " in
    *' --dry-run '* | *' --wheels '*) "${run[@]}" ;;
    *) mkdir -p "$out" && "${run[@]}" 2>&1 | tee "$out/gpu.log" ;;
esac
