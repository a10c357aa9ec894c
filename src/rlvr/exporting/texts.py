"""The fixed texts on which an export is compared with the trained policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIXED = (
    "What is seventeen plus twenty-five? Think first, then give the number alone.",
    "Name the capital of the country whose northernmost city is Hammerfest, please.",
    "def area(radius): return 3.14159 * radius ** 2  # of a circle, in square metres",
    "Das Schiff lief um 6 Uhr 45 aus; à midi, il était déjà loin. 価格は1,280円です。",
)
MOST_TRAJECTORIES = 12
MOST_TOKENS = 384  # of a text


def probe_texts(
    tokenizer: PreTrainedTokenizerBase, trajectories: Iterable[Mapping[str, Any]], *, max_tokens: int = MOST_TOKENS
) -> list[list[int]]:
    """Token ids of a run's newest trajectories, where training changed most, and of texts that are always the same.

    Args:
        trajectories: rows of `trajectories.jsonl`, in the order written.
    """
    newest: deque[Mapping[str, Any]] = deque(maxlen=MOST_TRAJECTORIES)
    newest.extend(row for row in trajectories if row["phase"] == "train")
    ids = [_conversation_ids(tokenizer, row["prompt"], row["completion"]) for row in newest]
    ids += [list(tokenizer(text, verbose=False)["input_ids"]) for text in FIXED]
    cut = [row[: min(max_tokens, MOST_TOKENS)] for row in ids]
    return [row for row in cut if len(row) > 1]


def _conversation_ids(tokenizer: Any, prompt: Any, completion: Any) -> list[int]:
    if isinstance(prompt, str):
        text = prompt + completion
    else:
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
