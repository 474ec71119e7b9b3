#!/usr/bin/env bash
# Everything a GPU machine is needed for, in order of worth; goes on after a failure.
#   scripts/gpu.sh [SECONDS]      # default 540, the budget of one call; call again to go on
# Needs python3 with torch, triton, numpy, pytest, onnxruntime; no network, nothing is installed.
# Results: results/<device>/bench_gpu.json, and one log per stage under $OUT (default out/gpu).
set -uo pipefail
usage="usage: scripts/gpu.sh [SECONDS]"
case "${1:-540}" in
    -h|--help) echo "$usage"; exit 0 ;;
    *[!0-9]*|"") echo "error: SECONDS is '$1', expected a whole number; $usage" >&2; exit 2 ;;
esac
budget="${1:-540}"
cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}"
logs="${OUT:-out/gpu}"
mkdir -p "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
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
    stage "bench-$1" 560 "$python" scripts/bench_gpu.py --sections "$1" --seconds "$(( $(left) - 30 ))"
}

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
bench correctness
bench ceilings
bench layer
bench blocks
bench step
stage tests 240 "$python" -m pytest -q -m gpu -p no:cacheprovider
bench shapes
# TensorRT-RTX names no Hopper GPU in its support matrix: does its portable plan load all the same?
stage rtx-plan 120 "$python" scripts/try_rtx_plan.py
for json in results/*/bench_gpu.json; do
    [ -f "$json" ] && stage roofline 60 "$python" scripts/plot_roofline.py "$json"
done
if [ "${#failed[@]}" -gt 0 ]; then echo "== not all well: ${failed[*]}"; exit 1; fi
echo "== all well"
