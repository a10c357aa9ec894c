"""What stand-ins for vLLM sample. Importable since pytest puts this folder on the path."""

from __future__ import annotations

import torch

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.generate import model_generate


def sampled(model, tokenizer, prompts, *, limit, temperature, seed=0):
    """A completion of each prompt, and the log-probabilities that a full forward gives its tokens."""
    sample = model_generate(model, tokenizer, SamplingSettings(temperature=temperature), batch_size=64, seed=seed)
    completions, _ = sample(prompts, [limit] * len(prompts))
    return completions, [_logprobs(model, *pair, temperature) for pair in zip(prompts, completions, strict=True)]


def _logprobs(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    values = (logits.float() / temperature).log_softmax(-1)
    return values.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
