#!/usr/bin/env bash
# What docs/performance.md and docs/compatibility.md report of a GPU, on the first one, with the Python at hand:
#   benchmarks/gpu.sh OUT            all
#   benchmarks/gpu.sh OUT peers      ours beside the peers
#   benchmarks/gpu.sh OUT overhead   our layer on Unsloth's trainer beside a script of Unsloth's own
#   benchmarks/gpu.sh OUT sizes      larger groups, a larger model
#   benchmarks/gpu.sh OUT engine     rollouts alone, with and without compilation
#   benchmarks/gpu.sh OUT checks     both backends' conformance and the tests marked gpu
#   benchmarks/gpu.sh OUT vllm       what they look at beside vLLM
# OUT gets results.jsonl (for plot.py), overhead.jsonl, sizes.jsonl, rollout.jsonl and a log of each check. About seven
# (nine with vLLM), nine, four, two, eleven and ten minutes. What is timed runs alone: a second process on the host,
# even on a GPU of its own, costs a step a tenth. So does vLLM, which gives up where others free memory.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?a folder for the results}") what=${2:-all}
mkdir -p "$out"
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
export PYTHONPATH=$PWD/src:${PYTHONPATH:-} HF_HUB_OFFLINE=1 WANDB_MODE=disabled UNSLOTH_AUTO_INSTALL=0
export CUDA_VISIBLE_DEVICES=0
if ! nvidia-smi > /dev/null 2>&1; then echo "$0: there is no GPU here." >&2; exit 2; fi

has_vllm() { python3 -c 'import vllm' > /dev/null 2>&1; }

peers() {
  step results --shape 1.5b --peers rlvr --steps 12
  step results --shape 1.5b --peers trl --steps 3
  step results --shape 1.5b --peers unsloth --steps 4
  if has_vllm; then step results --shape 1.5b --peers trl-vllm --steps 3; fi
}

overhead() { # of many short steps, and of a few long ones
  against_unsloth --prompt-tokens 64 --completion-tokens 8 --turns 30
  against_unsloth --turns 3
}

sizes() {
  step sizes --shape 1.5b --peers rlvr --group-size 8 32 --steps 6
  step sizes --shape 7b --peers rlvr --steps 4
}

engine() {
  python3 benchmarks/rollout_engine.py --shape 1.5b --compile off on | grep '^{' > "$out/rollout.jsonl"
}

checks() { # at the same time: nothing of them is timed
  export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
  local only=()
  if has_vllm; then only=(--only plugin,settings,lora,policy,training,sampling,saving,alone); fi # the other is in `vllm`
  for backend in hf unsloth; do
    check $backend "${only[@]}" --jobs 8 > "$out/check-$backend.txt" 2>&1 &
  done
  for tests in core unsloth; do
    make gpu-test-$tests PYTHON=python3 > "$out/gpu-test-$tests.txt" 2>&1 &
  done
  wait
}

vllm() {
  check unsloth --only engine > "$out/beside-unsloth.txt" 2>&1
  RLVR_TEST_UNSLOTH=0 python3 -m pytest -m gpu tests/rollout/test_vllm_gpu.py > "$out/vllm-hf.txt" 2>&1
  python3 -m pytest -m gpu tests/backends/test_unsloth_gpu.py -k vllm_samples > "$out/vllm-unsloth.txt" 2>&1
}

check() { python3 -c "from rlvr.cli import main; main()" backends check "$1" --device cuda "${@:2}"; }

against_unsloth() {
  python3 benchmarks/unsloth_overhead.py --shape 1.5b --models "$models" --out "$out/overhead.jsonl" "$@" \
    >> "$out/overhead.txt" 2>&1
}

step() { python3 benchmarks/step.py --models "$models" --out "$out/$1.jsonl" "${@:2}" >> "$out/$1.txt" 2>&1; }

case $what in
  all) peers; overhead; sizes; engine; checks; if has_vllm; then vllm; fi ;;
  peers | overhead | sizes | engine | checks | vllm) $what ;;
  *) echo "$0: $what is not known; allowed: peers, overhead, sizes, engine, checks, vllm, nothing." >&2; exit 2 ;;
esac
