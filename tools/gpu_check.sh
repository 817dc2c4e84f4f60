#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmarks, profile.
#
#   tools/gpu_check.sh [--dry-run] [NAME]
#
# Uses the torch of $PYTHON (default: python3) and the nvcc on the PATH or in CUDA_HOME; no network. What the machine
# lacks beside those (compute-sanitizer, ncu) is named and left out. Results: benchmarks/results/NAME.json and
# .md (NAME: the GPU's). --dry-run prints the commands instead of running them, but for the benchmarks, which run at toy
# size on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=0
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
PYTHON=${PYTHON:-python3}
failed=()

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
run() {
  if ((dry)); then printf '+ %q' "$1"; printf ' %q' "${@:2}"; printf '\n'; else "$@"; fi
}
# A step that fails does not keep the others from running; the exit status tells in the end.
try() { run "$@" || { failed+=("$current"); printf 'gpu_check: FAILED: %s\n' "$current"; }; }
begin() { current=$1; step "$1"; }

begin 'machine'
if ((dry)); then
  architecture=9.0 name=${1:-dry-run}
else
  "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' ||
    { echo "gpu_check: needs a GPU that the torch of $PYTHON can use (or --dry-run)" >&2; exit 2; }
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv || true
  architecture=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  name=${1:-$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()))')}
fi
results=benchmarks/results/$name.json

begin "build for $architecture"
# This machine's architecture alone; the whole list is compiled, and looked at, where there is no GPU.
run env PROBMOE_CUDA=1 TORCH_CUDA_ARCH_LIST="$architecture" "$PYTHON" setup.py -q build_ext --inplace

begin 'operators, with a GPU required'
try env PROBMOE_REQUIRE_CUDA=1 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_*cuda.py
try env PROBMOE_REQUIRE_CUDA=1 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops -k 'test_cuda and not test_cuda.py'
begin 'the rest of the operators'"'"' tests'
try env PROBMOE_REQUIRE_CUDA=1 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_contract.py \
  tests/ops/test_registry.py tests/ops/test_errors.py tests/ops/test_fallback.py -k 'not test_cuda and not inductor'

begin 'compute-sanitizer'
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if ((dry)) || [[ -x $sanitizer ]]; then
  for tool in memcheck racecheck initcheck; do
    begin "compute-sanitizer $tool"
    # Every allocation by itself, so that a byte past one is past all; our kernels alone, which have the name in theirs.
    try env PROBMOE_REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 "$sanitizer" --tool "$tool" \
      --error-exitcode 1 --kernel-name kernel_substring=probmoe \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_*cuda.py -k sanitizer
  done
else
  echo 'gpu_check: no compute-sanitizer on this machine, left out'
fi

begin 'benchmarks'
if ((dry)); then
  "$PYTHON" -m benchmarks.gpu --device cpu --rows 64 --hidden 32 --width 16 --seconds 0.01
else
  try "$PYTHON" -m benchmarks.gpu --json "$results"
fi

begin 'a whole model'
if ((dry)); then
  "$PYTHON" -m benchmarks.full_size --device cpu --layers 2 --hidden 64 --width 32 --experts 8 --k 4 --rows 2 --length 32 \
    --rounds 1
else
  try "$PYTHON" -m benchmarks.full_size --json "${results%.json}-full-size.json"
fi

begin 'profile'
if ((dry)) || command -v ncu >/dev/null; then
  for case in route_probmoe route_probmoe_backward route_top_k gumbel_top_k relaxed_top_k relaxed_top_k_backward \
    dirichlet_sample route_dirmoe; do
    # What binds: issue slots, memory, or neither (latency); registers and spills beside it.
    try ncu --kernel-name-base mangled --kernel-name 'regex:probmoe' --launch-skip 3 --launch-count 1 \
      --metrics "$(tr -d ' \n' <<<'
        gpu__time_duration.sum,
        sm__throughput.avg.pct_of_peak_sustained_elapsed,
        sm__inst_issued.avg.pct_of_peak_sustained_active,
        dram__throughput.avg.pct_of_peak_sustained_elapsed,
        l1tex__throughput.avg.pct_of_peak_sustained_active,
        sm__warps_active.avg.pct_of_peak_sustained_active,
        smsp__inst_executed.sum,launch__registers_per_thread,
        smsp__inst_executed_op_local_ld.sum')" \
      --log-file "${results%.json}-$case.ncu.txt" "$PYTHON" -m benchmarks.gpu --only "$case"
  done
else
  echo 'gpu_check: no ncu on this machine, left out'
fi

step 'done'
if ((${#failed[@]})); then
  printf 'gpu_check: failed: %s\n' "${failed[@]}"
  exit 1
fi
((dry)) || echo "gpu_check: passed; results in $results"
