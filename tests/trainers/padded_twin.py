"""The slow twin of the packed forward, the padded forward of an untouched model with log_softmax, and batches."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from places import ON_CPU, assert_as_near_to_the_truth, in_float32

from rlvr.trainers.shared_prefix import shared_prefix_logps
from rlvr.trainers.shared_prefix.packing import IGNORED

TEMPERATURE = 0.7
ISSUE_ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3")
WINDOWS = {
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 4},
}


def make_batch(prompt_of_row, completion_lengths, prompt_lengths, *, columns=(14, 7), seed=0):
    """Rows as TRL pads them; row r continues prompt `prompt_of_row[r]`. Masked columns hold real ids."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 259, (length,), generator=generator) for length in prompt_lengths]
    prompt_columns, completion_columns = columns
    input_ids = torch.zeros(len(prompt_of_row), sum(columns), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, (which, length) in enumerate(zip(prompt_of_row, completion_lengths, strict=True)):
        prompt = prompts[which]
        input_ids[row, prompt_columns - len(prompt) : prompt_columns] = prompt
        attention_mask[row, prompt_columns - len(prompt) : prompt_columns + length] = 1
        input_ids[row, prompt_columns:] = torch.randint(3, 259, (completion_columns,), generator=generator)
    return input_ids, attention_mask, completion_columns


def ragged_batch():
    """Groups of 3, 4, 1 and 1, shuffled; prompts of 5, 9, 1 and 12 tokens; one row masked throughout."""
    return make_batch([0, 1, 0, 2, 1, 3, 0, 1, 1], [4, 7, 7, 3, 0, 2, 1, 5, 6], [5, 9, 1, 12])


def even_batch():
    return make_batch([0, 0, 1, 1], [7, 7, 7, 7], [14, 14])


def on(device, batch):
    input_ids, attention_mask, columns = batch
    return input_ids.to(device), attention_mask.to(device), columns


def attach_head(model, temperature=TEMPERATURE):
    """TRL's fused head; where TRL's needs Triton and there is none (1.15 on a CPU), its contract in torch."""
    import trl
    from packaging.version import Version
    from trl.trainer.utils import add_fused_lm_head

    if Version(trl.__version__) >= Version("1.16") or torch.cuda.is_available():
        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
        return model
    original = model.forward

    def forward(*args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
        if not fused_lm_head:
            return original(*args, **kwargs)
        logits = original(*args, use_cache=False, **kwargs).logits
        if shift_labels is None:
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        log_probs, entropy = score(logits, shift_labels.clamp(min=0), temperature)
        scored = shift_labels != IGNORED
        return SimpleNamespace(log_probs=log_probs * scored, entropy=entropy * scored)

    model.forward = forward
    return model


def score(logits, targets, temperature=TEMPERATURE):
    log_p = (logits.float() / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def padded(model, batch):
    """The oracle: transformers' own padded forward."""
    input_ids, attention_mask, columns = batch
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logps, entropies = score(logits[:, -columns - 1 : -1], input_ids[:, -columns:])
    kept = attention_mask[:, -columns:]
    return logps * kept, entropies * kept


def gradients(model, logps, entropies):
    """Of an arbitrary weighting of both outputs, as a loss with an entropy bonus would give."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *logps.shape, generator=generator).to(logps.device)
    model.zero_grad()
    (logps * weights[0] + 0.3 * entropies * weights[1]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_lora(model):
    """LoRA on every linear layer, with B away from zero so that A has a gradient."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def prepare(model, *, lora=False, checkpointing=False, place=ON_CPU):
    """The same model twice: untouched for the oracle, and with the fused head."""
    oracle, model = copy.deepcopy(model), attach_head(model)
    models = [place.put(with_lora(m) if lora else m) for m in (oracle, model)]
    for m in models:
        m.train()
    if checkpointing:
        models[1].gradient_checkpointing_enable({"use_reentrant": False})
    return models


def assert_parity(oracle, model, batch, **how):
    """In bfloat16 as near to the float32 truth as the padded forward in bfloat16 is, within a factor."""
    batch = on(model.device, batch)
    outputs = shared_prefix_logps(model, *batch, compute_entropy=True, **how)[:2]
    expected = padded(oracle, batch)
    actual_gradients, expected_gradients = gradients(model, *outputs), gradients(oracle, *expected)
    assert actual_gradients.keys() == expected_gradients.keys()
    if oracle.dtype == torch.float32:
        for actual, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
        for name, error in errors(actual_gradients, expected_gradients).items():
            assert error < 1e-4, f"{name}: relative error {error:.1e}"
        return
    exact = in_float32(oracle)
    truth = padded(exact, batch)
    for actual, wanted, true in zip(outputs, expected, truth, strict=True):
        assert_as_near_to_the_truth(actual, wanted, true)
    true_gradients = gradients(exact, *truth)
    reference = errors(expected_gradients, true_gradients)
    for name, error in errors(actual_gradients, true_gradients).items():
        assert error <= 3 * reference[name] + 1e-2, f"{name}: {error:.1e}, padded {reference[name]:.1e}"


def errors(actual, expected):
    """Of each gradient, relative to its length."""
    return {
        name: float((actual[name].float() - wanted).norm() / wanted.norm().clamp(min=1e-8))
        for name, wanted in expected.items()
    }
