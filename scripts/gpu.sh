#!/usr/bin/env bash
# Everything a GPU machine is needed for, in order of worth; goes on after a failure.
#   scripts/gpu.sh [SECONDS]      # default 540, the budget of one call; call again to go on
#   scripts/gpu.sh --toy [SECONDS]    # the same stages at toy size on a CPU, kernels interpreted;
#                                     # default 3600, about two minutes of one core
# Needs python3 with torch, triton, numpy, pytest, onnxruntime; no network, nothing is installed.
# Results: results/<device>/bench_gpu.json (toy: bench_gpu.json beside the logs), and one log per
# stage under $OUT (default out/gpu, toy: out/toy).
set -uo pipefail
usage="usage: scripts/gpu.sh [--toy] [SECONDS]"
toy=() default=540 name=gpu most=560
if [ "${1:-}" = "--toy" ]; then toy=(--toy) default=3600 name=toy most=3600; shift; fi
case "${1:-$default}" in
    -h|--help) echo "$usage"; exit 0 ;;
    *[!0-9]*|"") echo "error: SECONDS is '$1', expected a whole number; $usage" >&2; exit 2 ;;
esac
budget="${1:-$default}"
[ "$#" -gt 1 ] && { echo "error: $# arguments, expected at most one; $usage" >&2; exit 2; }
cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}"
logs="${OUT:-out/$name}"
mkdir -p "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ "$name" = toy ]; then
    toy+=(--json "$logs/bench_gpu.json")
    export CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
began=$SECONDS
failed=()

left() { echo $(( budget - (SECONDS - began) )); }

stage() {  # name, most seconds, command: run with a limit, keep the log, never stop the script
    local name="$1" most="$2" limit; shift 2
    limit="$(left)"
    if [ "$limit" -lt 5 ]; then echo "== $name: no time left, call again"; failed+=("$name:later"); return 0; fi
    [ "$limit" -gt "$most" ] && limit="$most"
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" 2>&1 | tee "$logs/$name.log"
    local code="${PIPESTATUS[0]}"
    if [ "$code" -ne 0 ]; then echo "== $name ended with $code"; failed+=("$name:$code"); fi
    return 0
}

bench() {  # sections: the script itself stops in time and a later call goes on
    stage "bench-$1" "$most" "$python" -m scripts.gpu --sections "$1" \
        --seconds "$(( $(left) - 30 ))" ${toy[@]+"${toy[@]}"}
}

expect() {  # code, then as stage: ending with this code is what should happen
    local code="$1" kept=(${failed[@]+"${failed[@]}"}); shift
    stage "$@"
    local found="${failed[*]+${failed[*]:${#kept[@]}}}"
    failed=(${kept[@]+"${kept[@]}"})
    if [ "$found" = "$1:$code" ]; then echo "== $1: as expected here"; else failed+=("${found:-$1:0}"); fi
}

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
bench correctness
bench ceilings
bench layer
bench blocks
bench step
# Only files that hold such tests: others import what this machine may not have.
stage tests 240 "$python" -m pytest -q -m gpu $(grep -rl --include=test_*.py "mark\.gpu" tests)
bench shapes
# TensorRT-RTX names no Hopper GPU in its support matrix: does its portable plan load all the same?
if [ "$name" = toy ]; then  # says in one sentence that there is no GPU, or no library
    expect 2 rtx-plan 120 "$python" -m scripts.gpu.rtx_plan
    stage roofline 60 "$python" -m scripts.gpu.roofline "$logs/bench_gpu.json"
else
    stage rtx-plan 120 "$python" -m scripts.gpu.rtx_plan
    for json in results/*/bench_gpu.json; do
        [ -f "$json" ] && stage roofline 60 "$python" -m scripts.gpu.roofline "$json"
    done
fi
if [ "${#failed[@]}" -gt 0 ]; then echo "== not all well: ${failed[*]}"; exit 1; fi
echo "== all well"
