"""Scores of short answers: exact match and F1 as SQuAD and MuSiQue compute them, and answers in a text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, then without the articles a, an, the; single spaces.

    The steps and their order are those of the official SQuAD v1.1 and v2.0 evaluation, which MuSiQue's uses.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised reference, else 0.0."""
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(reference) for reference in _as_list(references)))


def f1(prediction: str, references: str | Sequence[str]) -> float:
    """Harmonic mean of precision and recall over normalised words; the best over the references.

    Where prediction or reference has no words left, the score is 1.0 if neither has, else 0.0.
    """
    predicted = normalize_answer(prediction).split()
    return max(
        (_f1(predicted, normalize_answer(reference).split()) for reference in _as_list(references)),
        default=0.0,
    )


def contains_answer(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if the words of a reference follow one another in the prediction, both normalised, else 0.0."""
    predicted = f" {normalize_answer(prediction)} "
    wanted = [normalize_answer(reference) for reference in _as_list(references)]
    return float(any(answer and f" {answer} " in predicted for answer in wanted))


def tagged(text: str, tag: str = "answer") -> str | None:
    """What stands between the last `<tag>` and its `</tag>`, stripped; None where there is no such pair."""
    found = re.findall(rf"<{re.escape(tag)}>((?:(?!<{re.escape(tag)}>).)*?)</{re.escape(tag)}>", text, re.DOTALL)
    return found[-1].strip() if found else None


def answer_in(text: str) -> str:
    """The text in the last `<answer>` tags; the whole text, stripped, where there are none."""
    found = tagged(text)
    return text.strip() if found is None else found


def _f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = sum((Counter(predicted) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _as_list(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references
