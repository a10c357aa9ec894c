"""The slow twin of the grouped engine: transformers' `generate` on the full ids, in bfloat16 a full forward."""

import torch
from places import in_float32
from transformers import RepetitionPenaltyLogitsProcessor


def generate_greedily(model, ids, max_new_tokens, eos=(), **settings):
    """One sequence, all of its ids, padded as in a batch with a longer one; transformers' own cache and masks."""
    padding = [0] * 3
    output = model.generate(
        torch.tensor([padding + ids], device=model.device),
        attention_mask=torch.tensor([padding + [1] * len(ids)], device=model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        **settings,
    )
    return output[0, len(padding) + len(ids) :].tolist()


def scored(model, history, tokens, repetition_penalty=1.0):
    """(tokens, vocabulary), the logits of a full forward from which each of the tokens follows."""
    penalize = RepetitionPenaltyLogitsProcessor(repetition_penalty)
    ids = torch.tensor([history + tokens], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits.float()
    ends = range(len(history), ids.shape[1])
    return torch.cat([penalize(ids[:, :end], logits[:, end - 1]) for end in ends])


def chosen(values, tokens):
    return values.gather(1, torch.tensor(tokens, device=values.device)[:, None])[:, 0]


def assert_as_generate(model, history, tokens, budget, eos=(), **settings):
    """In bfloat16, where rounding decides between tokens that are nearly as likely, each token is, but for that, the
    likeliest: if logits are off by e at most, the largest is of a token that 2e at most are lost by. An e of 3 times
    what the model's own forward is off by."""
    if model.dtype == torch.float32:
        assert tokens == generate_greedily(model, history, budget, eos, **settings), len(history)
        return
    assert tokens[-1] in eos or len(tokens) == budget
    assert not set(tokens[:-1]) & set(eos)
    truth = scored(in_float32(model), history, tokens, **settings)
    error = (scored(model, history, tokens, **settings) - truth).abs().max()
    assert (truth.amax(-1) - chosen(truth, tokens)).max() <= 2 * 3 * error, len(history)
