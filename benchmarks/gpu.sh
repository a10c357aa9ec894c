#!/usr/bin/env bash
# What docs/performance.md and docs/compatibility.md report of a GPU, in one go, with the Python at hand:
#   benchmarks/gpu.sh OUT            all; where there are two GPUs, two parts at a time, each with half of the cores
#   benchmarks/gpu.sh OUT peers      ours beside the peers, one after the other on one GPU
#   benchmarks/gpu.sh OUT sizes      larger groups, a larger model, the engine alone
#   benchmarks/gpu.sh OUT checks     both backends' conformance and the tests marked gpu
# OUT gets results.jsonl (for plot.py), sizes.jsonl, rollout.jsonl and a log of each check. Ten minutes for the longest.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?a folder for the results}") what=${2:-all}
mkdir -p "$out"
export PYTHONPATH=$PWD/src:${PYTHONPATH:-} HF_HUB_OFFLINE=1 WANDB_MODE=disabled UNSLOTH_AUTO_INSTALL=0
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l)
if ((gpus == 0)); then echo "$0: there is no GPU here." >&2; exit 2; fi

peers() {
  step results --shape 1.5b --peers rlvr trl --steps 4
  step results --shape 1.5b --peers unsloth rlvr-unsloth --steps 6
}

sizes() {
  step sizes --shape 1.5b --peers rlvr --group-size 8 32 --steps 6
  step sizes --shape 7b --peers rlvr --steps 4
  python3 benchmarks/rollout_engine.py --shape 1.5b --compile off on | grep '^{' > "$out/rollout.jsonl"
}

checks() { # at the same time: nothing of them is timed
  export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2
  for backend in hf unsloth; do
    python3 -c "from rlvr.cli import main; main()" backends check $backend --device cuda > "$out/check-$backend.txt" 2>&1 &
  done
  for tests in core unsloth; do
    make gpu-test-$tests PYTHON=python3 > "$out/gpu-test-$tests.txt" 2>&1 &
  done
  wait
}

step() { python3 benchmarks/step.py --out "$out/$1.jsonl" "${@:2}" >> "$out/$1.txt" 2>&1; }

half() { # of the GPUs and cores: half 0 or 1, for the parts that follow
  local cores=$(($(nproc) / 2))
  CUDA_VISIBLE_DEVICES=$1 taskset -c $(($1 * cores))-$(($1 * cores + cores - 1)) bash benchmarks/gpu.sh "$out" "$2"
}

case $what in
  all)
    if ((gpus > 1)); then half 0 peers & { half 1 sizes; half 1 checks; } & wait; else peers; sizes; checks; fi ;;
  peers | sizes | checks) $what ;;
  *) echo "$0: $what is not known; allowed: peers, sizes, checks, or nothing for all." >&2; exit 2 ;;
esac
