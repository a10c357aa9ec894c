"""The grouped rollout engine, timed: prompts × G completions of forced length, on random weights of real shapes.

    python benchmarks/rollout_engine.py --shape 1.5b --group-size 8 32 --lora merged apart --compile off on
    python benchmarks/rollout_engine.py --check                # greedy tokens against `generate`, float32
    python benchmarks/rollout_engine.py --drift --shape 1.5b   # log-probabilities against a training forward, bfloat16
    python benchmarks/rollout_engine.py --shape tiny --prompt-tokens 64 --completion-tokens 16   # anywhere

Speed does not depend on the weights' values, so nothing is downloaded. Prints one JSON line for each combination:
`first_s` is the first rollout, with capture and compilation; `open_s` (merging, prefill), `tokens_s` (sampling),
`close_s` (restoring the weights) and `total_s` are medians of the rollouts after it.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import random
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped import GroupedEngine
from rlvr.testing.tiny import tiny_model

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = {  # Qwen2.5's: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied embeddings
    "tiny": (64, 128, 2, 4, 2, 2_000, True),
    "small": (512, 1_408, 8, 8, 2, 32_000, True),
    "0.5b": (896, 4_864, 24, 14, 2, 151_936, True),
    "1.5b": (1_536, 8_960, 28, 12, 2, 151_936, True),
    "7b": (3_584, 18_944, 28, 28, 4, 152_064, False),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARCHITECTURES = {  # of the check: model type → configuration
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 50},
    "gemma3_text": {"sliding_window": 40, "final_logit_softcapping": 20.0},
    "phi3": {"heads": 4, "kv_heads": 4},  # head dim 48
}


def build(shape: str, dtype: torch.dtype, *, lora: bool = True):
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if lora:  # random adapters: merging them changes every weight
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, init_lora_weights=False)
        model = get_peft_model(model, adapter)
    return model


def make_prompts(groups: int, group_size: int, tokens: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    prompts = [[source.randrange(3, vocabulary) for _ in range(tokens)] for _ in range(groups)]
    return [prompt for prompt in prompts for _ in range(group_size)]


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def rollout(engine: GroupedEngine, prompts: list[list[int]], tokens: int):
    """One rollout with every completion forced to `tokens`: its turns in order, and the four moments of it."""
    moments = [now()]
    turns = {}
    with engine.open(prompts, max_completion_tokens=tokens) as session:
        moments.append(now())
        for index in range(len(prompts)):
            session.submit(index, [], tokens)
        while session.pending:
            turns.update((turn.index, turn) for turn in session.step())
        moments.append(now())
    moments.append(now())
    return [turns[index] for index in range(len(prompts))], moments


def measure(model, options, *, group_size: int, lora: str, compiled: str, execution: str) -> dict:
    engine = GroupedEngine(
        model,
        sampling=SamplingSettings(temperature=options.temperature),
        eos_token_ids=(),
        merge_lora=lora == "merged",
        compile_layers=compiled == "on",
        execution=execution,
    )
    vocabulary = model.config.vocab_size
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for repeat in range(options.repeats + 1):
        prompts = make_prompts(options.groups, group_size, options.prompt_tokens, vocabulary, seed=repeat)
        runs.append(rollout(engine, prompts, options.completion_tokens)[1])
    steady = runs[1:] or runs

    def median(begin: int, end: int) -> float:
        return round(statistics.median(moments[end] - moments[begin] for moments in steady), 4)

    if options.profile:
        profile(engine, make_prompts(options.groups, group_size, options.prompt_tokens, vocabulary), options)
    return {
        "shape": options.shape,
        "rows": f"{options.groups}x{group_size}",
        "prompt": options.prompt_tokens,
        "tokens": options.completion_tokens,
        "lora": lora,
        "compile": compiled,
        "execution": engine.execution,
        "first_s": round(runs[0][3] - runs[0][0], 3),
        "open_s": median(0, 1),
        "tokens_s": median(1, 2),
        "close_s": median(2, 3),
        "total_s": median(0, 3),
        "ms_per_token": round(1000 * median(1, 2) / options.completion_tokens, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None,
    }


def profile(engine: GroupedEngine, prompts: list[list[int]], options) -> None:
    """The kernels of opening a rollout and of 16 token steps by time, and where the host is while it opens."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    host = cProfile.Profile()
    host.enable()
    with engine.open(prompts, max_completion_tokens=options.completion_tokens):
        now()
        host.disable()
    pstats.Stats(host, stream=sys.stdout).sort_stats("tottime").print_stats(16)
    with profiler(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as record:
        rollout(engine, prompts, 1)
    _print_profile(record, "a rollout of one token")

    with engine.open(prompts, max_completion_tokens=options.completion_tokens) as session:
        for index in range(len(prompts)):
            session.submit(index, [], options.completion_tokens)
        for _ in range(max(1, options.completion_tokens // 32)):
            session.step()
        with profiler(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as record:
            session.step()
            now()
    _print_profile(record, "one step() call")


def _print_profile(record, what: str) -> None:
    sort = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda event: -_self_time(event))[:18]
    total = sum(_self_time(event) for event in record.key_averages())
    print(f"profile of {what}, {sort}: {total / 1000:.2f} ms in all")
    for event in events:
        print(f"  {_self_time(event) / 1000:8.3f} ms {event.count:6d} x  {event.key[:110]}")


def _self_time(event) -> float:
    return event.self_device_time_total if CUDA else event.self_cpu_time_total


def check(options) -> bool:
    """Greedy tokens of every architecture and execution against `generate`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    executions = ["graphs", "kernels", "eager"] if CUDA else ["eager"]
    good = True
    for architecture, settings in ARCHITECTURES.items():
        model = tiny_model(architecture, layers=3, **{"hidden_size": 192, "heads": 6, "kv_heads": 2, **settings})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
        model.to(DEVICE)
        for execution, compiled in [*itertools.product(executions, [False]), *[("graphs", True)] * CUDA]:
            good &= check_greedy(model, architecture, execution, compiled)
    if CUDA:
        good &= check_sampled(model)
    print(json.dumps({"check": "passed" if good else "FAILED"}))
    return good


def check_greedy(model, architecture: str, execution: str, compiled: bool) -> bool:
    """Two turns of ragged groups, ends of turn at different times."""
    source = random.Random(1)
    prompts = [[source.randrange(3, 259) for _ in range(n)] for n in (1, 70, 130, 33)]
    batch = [prompts[i] for i in (0, 1, 1, 2, 2, 2, 3, 1, 2)]
    engine = GroupedEngine(
        model, sampling=SamplingSettings(temperature=0), eos_token_ids=(), execution=execution, compile_layers=compiled
    )
    budgets = [40, 7, 90, 100, 3, 64, 65, 17, 128]
    histories, turns_left, wrong, worst = [list(ids) for ids in batch], [2] * len(batch), 0, 0.0
    played = []
    with engine.open(batch, max_completion_tokens=300) as session:
        for index, budget in enumerate(budgets):
            session.submit(index, [], budget)
        while session.pending:
            for turn in session.step():
                index = turn.index
                played.append((turn, list(histories[index])))
                histories[index] += turn.token_ids
                turns_left[index] -= 1
                if turns_left[index]:
                    new_ids = [source.randrange(3, 259) for _ in range(1 + 5 * index)]
                    histories[index] += new_ids
                    session.submit(index, new_ids, 20)
    for turn, history in played:
        ids = torch.tensor([history], device=DEVICE)
        expected = model.generate(
            ids, do_sample=False, max_new_tokens=len(turn.token_ids), eos_token_id=None, pad_token_id=0
        )
        wrong += turn.token_ids != expected[0, len(history) :].tolist()
        with torch.no_grad():
            full = torch.tensor([history + turn.token_ids], device=DEVICE)
            logits = model(full).logits[0, len(history) - 1 : -1].float().log_softmax(-1)
        exact = logits.gather(1, torch.tensor(turn.token_ids, device=DEVICE)[:, None])[:, 0].tolist()
        worst = max(worst, *(abs(a - b) for a, b in zip(turn.logprobs, exact, strict=True)))
    result = {
        "check": "greedy",
        "architecture": architecture,
        "execution": execution,
        "compiled": compiled,
        "turns": len(played),
        "wrong": wrong,
        "worst_logprob": worst,
    }
    print(json.dumps(result), flush=True)
    return wrong == 0 and worst < 1e-3


def check_sampled(model) -> bool:
    """With the same seed, graphs sample what the same kernels sample without graphs."""
    sampled = []
    sampling = SamplingSettings(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    for execution in ("graphs", "kernels"):
        engine = GroupedEngine(
            model, sampling=sampling, eos_token_ids=(2,), seed=3, execution=execution, compile_layers=False
        )
        prompts = make_prompts(3, 5, 40, 259)
        sampled.append([rollout(engine, prompts, 48)[0] for _ in range(2)])
    same = [turn.token_ids for run in sampled[0] for turn in run] == [
        turn.token_ids for run in sampled[1] for turn in run
    ]
    print(json.dumps({"check": "sampled, graphs == kernels", "same": same}), flush=True)
    return same


def drift(options) -> None:
    """How far rollout log-probabilities in bfloat16 are from a training forward's, with LoRA merged and apart."""
    model = build(options.shape, torch.bfloat16)
    prompts = make_prompts(2, 2, min(256, options.prompt_tokens), model.config.vocab_size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merged in (True, False):
        engine = GroupedEngine(model, sampling=SamplingSettings(), eos_token_ids=(), merge_lora=merged)
        turns, _ = rollout(engine, prompts, 64)
        ids = torch.tensor([p + turn.token_ids for p, turn in zip(prompts, turns, strict=True)], device=DEVICE)
        model.eval()
        with torch.no_grad():
            logits = model(ids, use_cache=False, logits_to_keep=65).logits[:, :-1].float()
        tokens = ids[:, -64:]
        exact = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        error = (torch.tensor([turn.logprobs for turn in turns], device=DEVICE) - exact).abs()
        result = {
            "check": "bfloat16 drift",
            "lora": "merged" if merged else "apart",
            "mean_abs": round(error.mean().item(), 5),
            "max_abs": round(error.max().item(), 5),
            "logprob_mean": round(exact.mean().item(), 3),
        }
        print(json.dumps(result), flush=True)
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    print(json.dumps({"check": "weights bit-identical after rollouts", "same": same}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b" if CUDA else "tiny")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, nargs="+", default=[8])
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--lora", choices=["merged", "apart"], nargs="+", default=["merged"])
    parser.add_argument("--compile", choices=["off", "on"], nargs="+", default=["on" if CUDA else "off"])
    parser.add_argument("--execution", choices=["auto", "graphs", "kernels", "eager"], nargs="+", default=["auto"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--drift", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.check:
        raise SystemExit(0 if check(options) else 1)
    if options.drift:
        drift(options)
        return
    model = build(options.shape, torch.bfloat16 if CUDA else torch.float32)
    for group_size, lora, compiled, execution in itertools.product(
        options.group_size, options.lora, options.compile, options.execution
    ):
        result = measure(model, options, group_size=group_size, lora=lora, compiled=compiled, execution=execution)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
