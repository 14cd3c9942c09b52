#!/usr/bin/env bash
# Everything that needs a GPU, in one go: PYTHON=.venv/bin/python tests/gpu_check.sh [FOLDER]
# Right: doctor, the tests of training, those of the kernels natively and with the T4's code, and
# under compute-sanitizer if it is there. Fast: the benchmarks of training and of the kernels, eager
# and as CUDA graphs, with plots. Good: with text in DATA (and VALID), what is learnt of it in 10 and
# in 60 seconds. All that is printed, and the results, go to FOLDER (build/gpu). A step that fails
# does not stop the others; the exit code says.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${1:-build/gpu}
mkdir -p "$out"
failed=0

step() { # NAME COMMAND...
  local name=$1
  shift
  printf '\n=== %s\n' "$name"
  "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
  [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "$name FAILED"; failed=1; }
}

nvidia-smi || exit 1
step doctor "$PYTHON" -m tinylm doctor
step doctor-kernels "$PYTHON" -m tinylm doctor --kernels
step doctor-kernels-sm75 env TRITON_OVERRIDE_ARCH=sm75 "$PYTHON" -m tinylm doctor --kernels
step tests "$PYTHON" -m pytest -m gpu -v tests

if command -v compute-sanitizer > /dev/null; then
  # torch's allocator hands out parts of large blocks, in which reading too far would not show.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 TRITON_INTERPRET=0 CUBLAS_WORKSPACE_CONFIG=:4096:8
  suite="tests/triton_attention.py tests/triton_norm.py tests/triton_rotary.py"
  suite+=" tests/triton_swiglu.py tests/triton_cross_entropy.py"
  chosen="test_attention or test_norm or test_swiglu or test_linear"
  for tool in memcheck racecheck; do
    step "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -q -x -p no:cacheprovider $suite -k "$chosen"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING TRITON_INTERPRET CUBLAS_WORKSPACE_CONFIG
else
  echo "compute-sanitizer is not there: neither memcheck nor racecheck ran"
fi

for graph in 0 1; do
  step "bench-graph-$graph" env TINYLM_BENCH_GRAPH=$graph "$PYTHON" -m pytest -q \
    bench/bench_kernels.py --benchmark-json="$out/kernels-graph-$graph.json"
  step "plot-graph-$graph" "$PYTHON" bench/plot_kernels.py \
    "$out/kernels-graph-$graph.json" "$out/kernels-graph-$graph.png"
done
step bench-train "$PYTHON" bench/bench_train.py --out "$out/train.json"

if [ -n "${DATA:-}" ]; then
  for tokenizer in bpe word; do
    for seconds in 10 60; do
      name=train-$tokenizer-$seconds
      minutes=$(awk "BEGIN {print $seconds / 60}")
      step "$name" "$PYTHON" -m tinylm train --data "$DATA" ${VALID:+--valid "$VALID"} \
        --tokenizer "$tokenizer" --minutes "$minutes" --out "$out/$name" --fresh
    done
  done
fi
exit $failed
