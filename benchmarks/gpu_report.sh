#!/usr/bin/env bash
# Everything that only a GPU can show, in at most ten minutes:
#
#     benchmarks/gpu_report.sh FOLDER
#
# builds for the GPU of this machine, runs the tests with CUDA required, compute-sanitizer over the
# tests of the op, the benchmark and an ncu profile of the main case. FOLDER gets a log for each
# step, op_cuda.json (results), tests.xml and summary.json (what each step came to). A step that
# fails, is missing or runs out of time is recorded and the others go on; the exit status is 0 only
# if all of them passed. $PYTHON is the Python to use, else that of .venv. Nothing is sent anywhere.
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} REQUIRE_CUDA=1
failed=0
records=()

# step NAME SECONDS COMMAND...: runs a command for at most so long, and not beyond the ten minutes,
# its output into NAME.log.
step() {
  local name=$1 seconds=$2 begin=$SECONDS left=$((590 - SECONDS)) status reason
  shift 2
  [ "$seconds" -le $left ] || seconds=$left
  if [ $seconds -le 0 ]; then
    echo "the ten minutes were over" > "$folder/$name.log"
    status=1
  elif command -v "$1" > /dev/null; then
    timeout --kill-after=5 "$seconds" "$@" > "$folder/$name.log" 2>&1
    status=$?
  else
    echo "$1 is not installed" > "$folder/$name.log"
    status=127
  fi
  case $status in
    0) reason=passed ;;
    124 | 137) reason="stopped after $seconds s" ;;
    *) reason="failed: $(grep -v '^\s*$' "$folder/$name.log" | tail -n 1 | cut -c 1-300)" ;;
  esac
  [ $status -eq 0 ] || failed=1
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - begin)) "$reason"
  records+=("$name" "$status" $((SECONDS - begin)) "$reason")
}

device=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
sanitize() {
  compute-sanitizer --tool "$1" --kernel-name kns=gradcampp --report-api-errors no \
    --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider "${@:2}"
}
export -f sanitize
export python

step device 10 nvidia-smi
step build 240 bash -c '
  [ -n "$0" ] || { echo "nvidia-smi names no GPU to build for"; exit 1; }
  GRADCAMPP_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$0 "$python" setup.py egg_info build_ext --inplace' "$device"
step about 20 "$python" -c '
import json, sys
sys.path.insert(0, "benchmarks")
from environment import about
from gradcampp_ext import _native
print(json.dumps(about(), indent=2))
missing = _native.status().cuda_missing
if missing: sys.exit(f"CUDA cannot be used: {missing}")
print(json.dumps(about("cuda")["cuda"], indent=2))'
step benchmark 140 "$python" benchmarks/bench_op.py --device cuda --seconds 100 \
  --json "$folder/op_cuda.json"
step tests 110 "$python" -m pytest -q -p no:cacheprovider --junitxml="$folder/tests.xml" \
  tests/test_cuda.py tests/test_ops.py tests/test_differentiable.py tests/test_imaging.py tests/test_smooth.py \
  -k cuda
# Without torch's own cache of memory every tensor ends where its allocation ends.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 60 bash -c 'command -v compute-sanitizer > /dev/null ||
  { echo "compute-sanitizer is not installed"; exit 1; }
  sanitize memcheck tests/test_ops.py -k "cuda and (targets or resize or uniform or weights)"'
step racecheck 60 bash -c 'command -v compute-sanitizer > /dev/null ||
  { echo "compute-sanitizer is not installed"; exit 1; }
  sanitize racecheck tests/test_ops.py -k "cuda and (targets or uniform)"'
step profile 60 ncu --set full --clock-control none --kernel-name regex:fused_kernel \
  --launch-skip 3 --launch-count 1 "$python" -c '
import torch
import gradcampp_ext as gx
a, g = (torch.randn(256, 2048, 7, 7, device="cuda") for _ in range(2))
for _ in range(4): gx.cam(a, g, size=(224, 224))
torch.cuda.synchronize()'
"$python" - "$folder/summary.json" "${records[@]}" << 'END'
import json, sys

fields = iter(sys.argv[2:])
steps = [
    {"step": step, "status": int(status), "seconds": int(seconds), "result": result}
    for step, status, seconds, result in zip(fields, fields, fields, fields)
]
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(steps, file, indent=2)
    file.write("\n")
END
exit $failed
