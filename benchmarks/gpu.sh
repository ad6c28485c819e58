#!/usr/bin/env bash
# What needs a GPU to be shown: scores equal to the CPU's, the times of an analysis, what callbacks cost, DepthLM beside
# the architectures that it is made of. About six minutes on one card; each part has a limit of its own, so that one that
# is slow does not cost the others.
#
#     bash benchmarks/gpu.sh               # PYTHON=... for the interpreter that has depthscope installed
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
status=0

part() {
    limit=$1
    shift
    echo
    echo "## $*"
    timeout "$limit" "$PYTHON" "$@" || { echo "failed or cut off at $limit s: $*"; status=1; }
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
part 60 benchmarks/gpu.py --only equal
part 150 benchmarks/gpu.py --only times
# Short batches leave a card idle: all experiments in one pass, beside each in its own.
part 60 benchmarks/lanes.py --device cuda
# A batch that keeps the card busy, and one so small that starting kernels is all the work there is.
part 100 benchmarks/callbacks.py --only 134M --rounds 15 --rows 64 --length 1024
part 70 benchmarks/callbacks.py --only 134M --rounds 15
part 60 benchmarks/architectures.py --bf16 --rounds 10 --only dense
part 60 benchmarks/architectures.py --bf16 --rounds 10 --only "wider experts"
exit $status
