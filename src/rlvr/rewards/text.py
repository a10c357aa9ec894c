"""Scores of short answers: exact match and F1 as SQuAD and MuSiQue compute them, and answers in a text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(
    r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})?(?:[.][0-9]{1,40})?(?<=[0-9])(?:e[+-]?[0-9]{1,2}|/[0-9]{1,40})?",
    re.I,
)
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


def same_answer(prediction: str, references: str | Sequence[str]) -> float:
    """As `exact_match`, but that a reference that is a number is compared by value: -5 is not 5, 42.0 is 42.

    The official normalisation drops signs and decimal points with the punctuation.
    """
    given = number(prediction)
    return float(
        any(
            exact_match(prediction, reference) if (wanted := number(reference)) is None else given == wanted
            for reference in _as_list(references)
        )
    )


def number(text: str) -> Fraction | None:
    """The number that a text is: 42, -1,000.5, 1/2, $3, 50 % or 2e-3; None if it is none, or more than a number."""
    plain = text.strip().lstrip("$€£").rstrip("%").strip().removesuffix(".").replace("−", "-")
    match = _NUMBER.fullmatch(plain)
    if match is None:
        return None
    try:
        return Fraction(plain.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # 1.5/2, 1/0
        return None


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
