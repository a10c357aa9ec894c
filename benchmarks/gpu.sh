#!/usr/bin/env bash
# What docs/performance.md and docs/compatibility.md report of a GPU, in one go, with the Python at hand:
#   benchmarks/gpu.sh OUT            timings on the first GPU; checks on the last, at the same time where there are two
#   benchmarks/gpu.sh OUT timings    or checks
# OUT gets results.jsonl (for plot.py), rollout.jsonl and a log for each check. About ten minutes a part.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?a folder for the results}") what=${2:-all}
mkdir -p "$out"
export PYTHONPATH=$PWD/src:${PYTHONPATH:-} HF_HUB_OFFLINE=1 WANDB_MODE=disabled UNSLOTH_AUTO_INSTALL=0
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l)
if ((gpus == 0)); then echo "$0: there is no GPU here." >&2; exit 2; fi

timings() {
  export CUDA_VISIBLE_DEVICES=0
  local step="python3 benchmarks/step.py --out $out/results.jsonl"
  $step --shape 1.5b --peers rlvr --steps 8
  $step --shape 1.5b --peers rlvr --steps 4 --group-size 32
  $step --shape 7b --peers rlvr --steps 4
  $step --shape 1.5b --peers trl unsloth rlvr-unsloth --steps 4
  python3 benchmarks/rollout_engine.py --shape 1.5b --compile off on | grep '^{' > "$out/rollout.jsonl"
}

checks() {
  export CUDA_VISIBLE_DEVICES=$((gpus - 1))
  for backend in hf unsloth; do
    python3 -c "from rlvr.cli import main; main()" backends check $backend --device cuda > "$out/check-$backend.txt" 2>&1
  done
  make gpu-test PYTHON=python3 > "$out/gpu-test.txt" 2>&1
}

case $what in
  all) if ((gpus > 1)); then timings & checks & wait; else timings; checks; fi ;;
  timings | checks) $what ;;
  *) echo "$0: $what is not known; allowed: timings, checks, or nothing for both." >&2; exit 2 ;;
esac
