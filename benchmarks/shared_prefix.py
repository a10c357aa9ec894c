"""The update of one GRPO step, forward and backward, by every way of computing it: seconds and peak memory.

    python benchmarks/shared_prefix.py --shape 1.5b   # everything, on the GPU if there is one
    python benchmarks/shared_prefix.py --shape tiny --prompt-tokens 64 --completion-tokens 16 --groups 2
    python benchmarks/shared_prefix.py --variants flash,flash/fused@4 --profile flash/fused --out results/

The work: `groups` prompts with `group-size` completions each, LoRA of rank 16 on all linear layers, bfloat16
weights, float32 adapters under autocast, as in TRL. Weights are random and loaded from nowhere: speed
and memory do not depend on their values.

A variant is FORWARD[/OPTION...][@GROUPS], GROUPS being how many groups make a micro-batch:
    padded      every row by itself, padded: what TRL does
    mask        packed row, SDPA with an explicit tree mask
    sdpa        packed row, SDPA group by group
    flash       packed row, variable-length flash kernel
    /fused      LoRA layers by rlvr.fused.lora
    /layers     norms, rotations and gated activations by rlvr.fused.layers
    /compile    decoder layers by torch.compile, attention apart (checkpointed up to transformers 5.17 only)
    /kept       no gradient checkpointing; /kept=40 keeps 40% of the layers and checkpoints the others

One JSON line for each: seconds for all groups (the best of `repeats`, after a warm-up), peak GiB, and how far
the first group's log-probabilities are from the first variant's (where micro-batches are of the same size).
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch._dynamo.utils
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlvr.fused.layers import fuse_layers, unfuse_layers
from rlvr.fused.lora import fuse_lora, unfuse_lora
from rlvr.trainers.shared_prefix import attention, enable, pack_rows, shared_prefix_logps
from rlvr.trainers.shared_prefix.support import unwrap

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 2_000),
    "0.5b": (896, 4_864, 24, 14, 2, 151_936),
    "1.5b": (1_536, 8_960, 28, 12, 2, 151_936),
    "7b": (3_584, 18_944, 28, 28, 4, 152_064),
}
VARIANTS = (
    "padded,padded/fused,mask,sdpa,flash,flash@2,flash@4,flash/fused,flash/fused@2,flash/fused@4,flash/fused@8,"
    "flash/kept,flash/fused/kept,flash/fused/kept=50,flash/fused/kept=25,flash/fused/kept=25@2,"
    "flash/fused/layers,flash/fused/layers@2,flash/fused/layers@4,flash/fused/layers@8,flash/fused/layers/kept=25@2,"
    "flash/compile,flash/compile/fused,flash/compile/fused@4,flash/compile/fused/kept,flash/compile/fused/kept=50"
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def build_model(shape: str):
    hidden, intermediate, layers, heads, kv_heads, vocab_size = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=shape != "7b",
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    head = add_head(model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), head


def add_head(model) -> str:
    """TRL's fused head, or one like it in plain torch where there is no GPU or no TRL. Returns which."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        add_fused_lm_head = None
    if not CUDA or add_fused_lm_head is None:
        model.forward = PlainHead(model)
        return "plain"
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return "trl"


class PlainHead:
    """Log-probabilities and entropies, 1,024 tokens at a time, computed again in the backward pass."""

    def __init__(self, model):
        self.model, self.forward = model, model.forward

    def __call__(self, *args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
        from types import SimpleNamespace

        if not fused_lm_head:
            return self.forward(*args, **kwargs)
        hidden = self.model.model(*args, use_cache=False, **kwargs).last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        mask = shift_labels != -100
        pairs = zip(hidden[mask].split(1024), shift_labels[mask].split(1024), strict=True)
        parts = [checkpoint(self.score, h, targets, use_reentrant=False) for h, targets in pairs]
        log_probs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        zeros = torch.zeros(mask.shape, device=mask.device)
        return SimpleNamespace(
            log_probs=zeros.masked_scatter(mask, log_probs), entropy=zeros.masked_scatter(mask, entropy)
        )

    def score(self, hidden, targets):
        log_p = self.model.lm_head(hidden).float().log_softmax(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


class Variant:
    def __init__(self, name: str):
        body, _, groups = name.partition("@")
        self.name, self.groups = name, int(groups or 1)
        self.forward, *options = body.split("/")
        if self.forward not in ("padded", "mask", "sdpa", "flash"):
            raise SystemExit(f"unknown variant {name!r}; it starts with padded, mask, sdpa or flash")
        self.fused, self.layers, self.compiled = (name in options for name in ("fused", "layers", "compile"))
        kept = [option for option in options if option.startswith("kept")]
        self.kept_percent = int(kept[0].partition("=")[2] or 100) if kept else 0

    @contextmanager
    def applied(self, model):
        """The model set up for this variant, and put back."""
        layers = unwrap(model).model.layers
        keep_every = 100 / self.kept_percent if self.kept_percent else float("inf")
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = int(i / keep_every) == int((i - 1) / keep_every) if i else True
            if self.kept_percent in (0, 100):
                layer.gradient_checkpointing = self.kept_percent == 0
        (fuse_lora if self.fused else unfuse_lora)(model)
        (fuse_layers if self.layers else unfuse_layers)(model)
        eager_attention = attention.tree_attention
        if self.compiled:
            attention.tree_attention = torch.compiler.disable(eager_attention)
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.utils.counters.clear()
            for layer in layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
        try:
            yield
        finally:
            attention.tree_attention = eager_attention
            for layer in layers:
                layer.__dict__.pop("forward", None)
            if self.compiled:
                torch._dynamo.reset()

    def logps(self, model, input_ids, attention_mask, columns):
        if self.forward in ("sdpa", "flash"):
            flash = self.forward == "flash"
            return shared_prefix_logps(model, input_ids, attention_mask, columns, compute_entropy=True, flash=flash)[0]
        if self.forward == "padded":
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            labels[:, :-columns] = -100
            outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
            return outputs.log_probs[:, -columns:]
        packed = pack_rows(input_ids, attention_mask, columns)
        outputs = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=tree_mask(packed.groups, packed.packed_tokens),
            shift_labels=packed.labels,
            fused_lm_head=True,
        )
        return packed.unpack(outputs.log_probs, len(input_ids), columns)


def tree_mask(groups, tokens):
    """(1, 1, N, N), True where a token may look."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for group in groups:
        trunk_end = group.start + group.trunk
        mask[group.start : trunk_end, group.start : trunk_end] = True
        start = trunk_end
        for length in group.branches:
            mask[start : start + length, group.start : trunk_end] = True
            mask[start : start + length, start : start + length] = True
            start += length
    return mask.tril_()[None, None].to(DEVICE)


def make_micro_batch(options, groups: int):
    prompts = torch.randint(10, 1_900, (groups, options.prompt_tokens), device=DEVICE)
    completions = (groups * options.group_size, options.completion_tokens)
    input_ids = torch.cat(
        [
            prompts.repeat_interleave(options.group_size, 0),
            torch.randint(10, 1_900, completions, device=DEVICE),
        ],
        1,
    )
    return input_ids, torch.ones_like(input_ids), options.completion_tokens


def update(variant, model, micro_batches):
    """All groups forward and backward; the first micro-batch's log-probabilities."""
    model.zero_grad()
    first = None
    for batch in micro_batches:
        with torch.autocast(DEVICE, torch.bfloat16) if CUDA else nullcontext():
            logps = variant.logps(model, *batch)
        first = logps.detach() if first is None else first
        (logps * torch.linspace(-1, 1, len(logps), device=DEVICE)[:, None]).mean().backward()
    if CUDA:
        torch.cuda.synchronize()
    return first


def measure(variant, model, options):
    torch.manual_seed(1)
    micro_batches = [make_micro_batch(options, variant.groups) for _ in range(options.groups // variant.groups)]
    start = time.perf_counter()
    first = update(variant, model, micro_batches[:1])
    warm_up = time.perf_counter() - start
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        update(variant, model, micro_batches)
        seconds.append(time.perf_counter() - start)
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None
    figures = {"seconds": round(min(seconds), 3), "peak_gib": peak, "warm_up_s": round(warm_up, 2)}
    return first, {**figures, "compiled_graphs": graphs} if variant.compiled else figures


def profile(variant, model, options):
    """Where one micro-batch's time goes: kernels by time on the device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    batch = make_micro_batch(options, variant.groups)
    update(variant, model, [batch])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with torch_profile(activities=activities) as result:
        update(variant, model, [batch])
    sort = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    return result.key_averages().table(sort_by=sort, row_limit=60, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b" if CUDA else "tiny")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--profile", default="", help="variants to profile, after the measurements")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl and the profiles")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)

    model, head = build_model(options.shape)
    enable(unwrap(model))
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "head": head, **vars(options)}, default=str))
    reference = None
    for variant in map(Variant, filter(None, options.variants.split(","))):
        row = {"variant": variant.name}
        try:
            with variant.applied(model):
                first, figures = measure(variant, model, options)
            row.update(figures)
            group = first[: options.group_size]
            reference = (variant.groups, group) if reference is None else reference
            if reference[0] == variant.groups:
                row["logp_difference"] = round((group - reference[1]).abs().max().item(), 5)
        except Exception as error:  # one variant that fails or does not fit must not cost the others
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        model.zero_grad()
        if CUDA:
            torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)
        if options.out:
            with (options.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    for name in filter(None, options.profile.split(",")):
        variant = Variant(name)
        with variant.applied(model):
            table = profile(variant, model, options)
        if options.out:
            (options.out / f"profile-{name.replace('/', '-')}.txt").write_text(table)
        else:
            print(table)


if __name__ == "__main__":
    main()
