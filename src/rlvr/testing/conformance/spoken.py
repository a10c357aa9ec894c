"""What a tokenizer makes of fixed texts and messages: two are compared by that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ("Take a note of the other fox, at 12.5% or so.", "naïve façade, 東京, 😀", "a\nb<|im_end|>\tc")
MESSAGES = (
    {"role": "user", "content": "What is seventeen plus twenty-five?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And one more?"},
)


def spoken(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids, by what they are made of."""
    ids: dict[str, list[int]] = {repr(text): tokenizer(text)["input_ids"] for text in TEXTS}
    for name, prompted in (("three messages", False), ("three messages, to be answered", True)):
        rendered: Any = tokenizer.apply_chat_template(
            list(MESSAGES), add_generation_prompt=prompted, tokenize=True, return_dict=False
        )
        ids[name] = rendered
    ids["the end of a turn"] = [tokenizer.eos_token_id]
    return ids


def difference(tokenizer: PreTrainedTokenizerBase, wanted: dict[str, list[int]]) -> str | None:
    """The first thing of which it makes other ids than `wanted`, as the end of a finding; None if there is none."""
    for name, found in spoken(tokenizer).items():
        if found != wanted[name]:
            pairs = zip(found, wanted[name], strict=False)
            places = (f"; id {i} is {a} instead of {b}" for i, (a, b) in enumerate(pairs) if a != b)
            return (
                f"{name} becomes {tokenizer.decode(found)!r} and should be {tokenizer.decode(wanted[name])!r}: "
                f"{len(found)} ids instead of {len(wanted[name])}{next(places, '')}"
            )
    return None
