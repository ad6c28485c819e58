#!/usr/bin/env bash
# What needs a GPU to be shown: scores equal to the CPU's, the times of an analysis, a 7B model on the card and with its
# layers in the host's memory, what callbacks cost, DepthLM beside the architectures that it is made of. At most eight
# minutes on one card; each part has a limit of its own, so that one that is slow does not cost the others.
#
#     bash benchmarks/gpu.sh               # PYTHON=... for the interpreter that has depthscope installed
#     bash benchmarks/gpu.sh --cpu         # the analyses at toy size on the CPU: shows that the script runs
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

if [ "${1:-}" = --cpu ]; then
    part 120 benchmarks/gpu.py --cpu
    part 60 benchmarks/lanes.py --tiny --rounds 1
    exit $status
fi

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
part 60 benchmarks/gpu.py --only equal
part 90 benchmarks/gpu.py --only large
part 110 benchmarks/gpu.py --only times
# Short batches leave a card idle: all experiments in one pass, beside each in its own.
part 50 benchmarks/lanes.py --device cuda
# A batch that keeps the card busy, and one so small that starting kernels is all the work there is.
part 60 benchmarks/callbacks.py --only 134M --rounds 8 --rows 64 --length 1024
part 40 benchmarks/callbacks.py --only 134M --rounds 8
part 50 benchmarks/callbacks.py --only 1.2B --rounds 5
part 20 benchmarks/architectures.py --bf16 --rounds 5 --only dense
exit $status
