"""One GRPO optimizer step, ours beside the peers', in one go.

    python benchmarks/step.py --shape 1.5b --peers rlvr trl unsloth           # on a GPU
    python benchmarks/step.py --shape small --peers rlvr trl --prompt-tokens 1024 --completion-tokens 64   # on a CPU

Every peer runs in a process of its own on the same model (random weights, made on the spot) and the same work: per
optimizer step `--groups` prompts and `--group-size` completions of each, `--completion-tokens` long; LoRA rank 16 on
all linear layers, bfloat16 on a GPU and float32 on a CPU, loss dr_grpo, beta 0. A micro-batch is one group for the
peers and four for `rlvr`, which are about as many tokens once a prompt is computed once (`--micro-batch-groups` sets
it for all). What a user would write for each of them; `trl` and `unsloth` use nothing of ours, and `rlvr-unsloth`
against `unsloth` is what our layer costs there. Several values of `--group-size`, `--prompt-tokens` or
`--completion-tokens` make a sweep.

Prints a JSON line for each run and a Markdown table at the end: medians over `--steps` after a warm-up step. They are
the first of a run of `--run-steps`, which is then stopped: `rlvr` compiles where a run is long enough to pay for it.
Rollout is what makes completions; scoring is rewards, advantages and extra forward passes; update is the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary: Qwen2.5's, and one for CPUs
    "small": (256, 1_024, 4, 8, 2, 8_000),
    "0.5b": (896, 4_864, 24, 14, 2, 151_936),
    "1.5b": (1_536, 8_960, 28, 12, 2, 151_936),
    "7b": (3_584, 18_944, 28, 28, 4, 152_064),
}
PEERS = ("rlvr", "rlvr-unsloth", "trl", "trl-vllm", "unsloth")
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["rlvr", "trl"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[2_048])
    parser.add_argument("--completion-tokens", nargs="+", type=int, default=[256])
    parser.add_argument("--group-size", nargs="+", type=int, default=[8])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="the first warms up")
    parser.add_argument("--run-steps", type=int, default=200, help="of the run whose first steps are timed")
    parser.add_argument("--micro-batch-groups", type=int, help="default: 4 for rlvr, 1 for the others")
    parser.add_argument("--gradient-checkpointing", choices=("on", "off"), default="on")
    parser.add_argument("--rollout-engine", default="auto")
    parser.add_argument("--shared-prefix", default="auto")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--models", help="keep the models that are made in this folder, and take those in it")
    parser.add_argument("--out", help="append the JSON lines to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.model:
        print("RESULT " + json.dumps(measure(options)), flush=True)
        return
    rows = []
    kept = contextlib.nullcontext(options.models) if options.models else tempfile.TemporaryDirectory()
    with kept as folder:
        model = str(Path(folder, options.shape))
        if not Path(model).exists():
            subprocess.run([sys.executable, __file__, "--shape", options.shape, "--model", model], check=True)
        sweep = itertools.product(options.prompt_tokens, options.completion_tokens, options.group_size, options.peers)
        for prompt_tokens, completion_tokens, group_size, peer in sweep:
            command = [
                sys.executable, __file__, "--model", model, "--shape", options.shape, "--peers", peer,
                "--prompt-tokens", str(prompt_tokens), "--completion-tokens", str(completion_tokens),
                "--group-size", str(group_size), "--groups", str(options.groups), "--steps", str(options.steps),
                "--rollout-engine", options.rollout_engine, "--shared-prefix", options.shared_prefix,
                "--gradient-checkpointing", options.gradient_checkpointing, "--run-steps", str(options.run_steps),
            ]  # fmt: skip
            if options.micro_batch_groups:
                command += ["--micro-batch-groups", str(options.micro_batch_groups)]
            finished = subprocess.run(command, capture_output=True, text=True)
            lines = [line[7:] for line in finished.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{peer} failed:\n{finished.stdout[-1500:]}\n{finished.stderr[-3000:]}", flush=True)
                continue
            print(lines[0], flush=True)
            rows.append(json.loads(lines[0]))
            if options.out:
                with open(options.out, "a") as file:
                    file.write(lines[0] + "\n")
    table(rows)


def table(rows: list[dict]) -> None:
    print("\n| peer | prompt + completion | G | step s | rollout s | scoring s | update s | peak GiB | first step s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['peer']} | {row['prompt_tokens']} + {row['completion_tokens']} | {row['group_size']} "
            f"| {row['step_s']:.2f} | {row['rollout_s']:.2f} | {row['scoring_s']:.2f} | {row['update_s']:.2f} "
            f"| {row['peak_gib'] if row['peak_gib'] is not None else '–'} | {row['first_step_s']:.1f} |"
        )


def build(shape: str, folder: str) -> None:
    """A model with random weights and its tokenizer, one token a byte, as `from_pretrained` reads them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlvr.testing.tiny import tiny_tokenizer

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    tokenizer = tiny_tokenizer(vocabulary - 100)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32_768,
        tie_word_embeddings=shape != "7b", rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(options: argparse.Namespace) -> dict:
    if not Path(options.model).exists():
        build(options.shape, options.model)
        return {}
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", UNSLOTH_AUTO_INSTALL="0")
    peer = options.peers[0]
    if peer.endswith("unsloth"):
        import unsloth  # noqa: F401 - before trl, transformers and peft
    import torch

    cuda = torch.cuda.is_available()
    trainer = trainer_of(peer, options, cuda)
    clock = Clock(cuda)
    trainer._generate = clock.timed("rollout", trainer._generate)
    trainer._generate_and_score_completions = clock.timed("scored", trainer._generate_and_score_completions)
    ends = end_of_each_step(trainer, clock, steps=options.steps)
    began = clock.now()
    trainer.train()

    steps = [after - before for before, after in itertools.pairwise(ends)]
    rollout = statistics.median(clock.seconds["rollout"][1:])
    scoring = statistics.median(clock.seconds["scored"][1:]) - rollout
    step = statistics.median(steps)
    return {
        "peer": peer,
        "shape": options.shape,
        "prompt_tokens": options.prompt_tokens[0],
        "completion_tokens": options.completion_tokens[0],
        "group_size": options.group_size[0],
        "groups": options.groups,
        "micro_batches": trainer.args.gradient_accumulation_steps,
        "step_s": step,
        "rollout_s": rollout,
        "scoring_s": scoring,
        "update_s": step - rollout - scoring,
        "first_step_s": ends[0] - began,
        "first_rollout_s": clock.seconds["rollout"][0],  # with what its engine compiles and captures
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "engine": getattr(getattr(trainer, "engine", None), "name", None),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "steps": len(steps),
        "each_step_s": [round(seconds, 3) for seconds in steps],
    }


class Clock:
    """Seconds of named calls. The device is waited for at their beginning and end only: a step runs as it does in
    training, where the host goes ahead of the device."""

    def __init__(self, cuda: bool):
        self._cuda = cuda
        self.seconds: dict[str, list[float]] = {}

    def now(self) -> float:
        import torch

        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name, function):
        def call(*args, **kwargs):
            began = self.now()
            result = function(*args, **kwargs)
            self.seconds.setdefault(name, []).append(self.now() - began)
            return result

        return call


def end_of_each_step(trainer, clock: Clock, steps: int) -> list[float]:
    """The moments at which optimizer steps were over, as they come; after so many the run is stopped."""
    from transformers import TrainerCallback

    ends = []

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(clock.now())
            control.should_training_stop = len(ends) >= steps

    trainer.add_callback(Stopwatch)
    return ends


def trainer_of(peer: str, options: argparse.Namespace, cuda: bool):
    """The trainer that a user of this peer would make."""
    import random

    from datasets import Dataset

    prompt_tokens, completion_tokens = options.prompt_tokens[0], options.completion_tokens[0]
    group_size = options.group_size[0]
    random.seed(0)
    letters = "abcdefghij "
    texts = ["".join(random.choices(letters, k=prompt_tokens - 20)) for _ in range(options.groups * options.steps)]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])
    length = prompt_tokens + completion_tokens + 128

    def random_reward(completions, **kwargs):
        return [random.random() for _ in completions]

    ours = peer.startswith("rlvr")
    model, tokenizer, peft_config = policy(peer, options.model, length, cuda)
    micro_groups = min(options.micro_batch_groups or (4 if peer == "rlvr" else 1), options.groups)

    from trl import GRPOConfig, GRPOTrainer

    rollouts = {}
    if peer == "trl-vllm":
        rollouts = {
            "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3,
            "vllm_max_model_length": length,
        }  # fmt: skip
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=group_size * micro_groups,
        num_generations=group_size, gradient_accumulation_steps=options.groups // micro_groups,
        max_completion_length=completion_tokens, max_steps=max(options.steps, options.run_steps),
        bf16=cuda, use_cpu=not cuda,
        gradient_checkpointing=options.gradient_checkpointing == "on" and not peer.endswith("unsloth"),
        learning_rate=1e-5, lr_scheduler_type="constant", beta=0.0, loss_type="dr_grpo", scale_rewards="none",
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, temperature=1.0, **rollouts,
    )  # fmt: skip
    arguments = {
        "model": model, "processing_class": tokenizer, "reward_funcs": random_reward, "train_dataset": dataset,
        "peft_config": peft_config, "args": args,
    }  # fmt: skip
    if not ours:
        return GRPOTrainer(**arguments)
    from rlvr.trainers import EnhancedGRPOTrainer

    return EnhancedGRPOTrainer(
        **arguments, rollout_engine=options.rollout_engine, shared_prefix=options.shared_prefix,
        trajectory_sinks=[lambda records: None],  # with records, and the hash of the weights in them, as in a run
    )  # fmt: skip


def policy(peer: str, folder: str, length: int, cuda: bool):
    """(model, tokenizer, peft_config) of a peer."""
    import torch

    if peer == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            folder, max_seq_length=length, dtype=torch.bfloat16 if cuda else torch.float32, load_in_4bit=False,
            fast_inference=False, max_lora_rank=16,
        )  # fmt: skip
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, target_modules=LORA_MODULES, use_gradient_checkpointing="unsloth",
            random_state=1,
        )  # fmt: skip
        return model, tokenizer, None
    if peer.startswith("rlvr"):
        import rlvr

        backend = "unsloth" if peer == "rlvr-unsloth" else "hf"
        loaded = rlvr.load_policy(
            folder, backend=backend, max_seq_length=length, lora=rlvr.LoraSettings(r=16, alpha=32, alpha_multiplier=1)
        )
        return loaded.model, loaded.tokenizer, None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation="sdpa",
        device_map="cuda" if cuda else None,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LORA_MODULES)
    return model, AutoTokenizer.from_pretrained(folder), lora


if __name__ == "__main__":
    main()
