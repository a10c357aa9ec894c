"""MuSiQue's rows: loading, checking, noise. Trivedi et al. 2022, arXiv:2108.00573."""

from __future__ import annotations

import logging
import random
import re
from typing import Any

from rlvr.environments.loading import Row, load_rows
from rlvr.environments.musique.sample import sample_questions
from rlvr.errors import DataError

logger = logging.getLogger(__name__)

SAMPLE = "sample"
UNANSWERABLE = "unanswerable"  # the answer of a question whose paragraphs do not hold it


def load_questions(
    datasets: str,
    *,
    split: str = "train",
    noise: float = 1.0,
    answerable_only: bool = True,
    fewer_hops_first: bool = False,
    seed: int = 0,
    sample_size: int = 200,
    sample_hops: tuple[int, ...] = (2, 3, 4),
    sample_paragraphs: int = 20,
    sample_words: int | None = None,
) -> list[Row]:
    """Questions with their paragraphs, from MuSiQue's own format.

    Rows that are malformed are left out, counted and named in one warning a dataset.

    Args:
        datasets: as `load_rows` takes them; `sample` among them is a made-up set, see `sample_questions`.
        split: taken where a dataset names none.
        noise: share of the paragraphs that do not support the answer which is kept, 0 to 1.
        answerable_only: leaves out the questions that cannot be answered; otherwise their answer is
            "unanswerable".
        fewer_hops_first: orders the questions by their number of hops.
        seed: decides which paragraphs are kept, and the sample.
        sample_size: questions in the sample.
        sample_hops: numbers of hops in the sample.
        sample_paragraphs: paragraphs of a question in the sample.
        sample_words: different words that the sample's names are made of; None: any.

    Returns:
        Rows with `id, question, answer, references, paragraphs, answerable, hops, supporting`; `references`
        are the answer and its aliases, `supporting` the `idx` of the supporting paragraphs, hop by hop where the
        row has MuSiQue's `question_decomposition`.

    Raises:
        DataError: a dataset cannot be loaded, or no row of it can be used.
    """
    if not 0 <= noise <= 1:
        raise DataError(f"noise is {noise}; allowed: from 0 (supporting paragraphs alone) to 1 (all paragraphs).")
    rows: list[Row] = []
    for part in filter(None, (part.strip() for part in datasets.split(";"))):
        problems: list[str] = []
        if part == SAMPLE:
            found = sample_questions(
                sample_size,
                seed=seed,
                hops=sample_hops,
                paragraphs=sample_paragraphs,
                words=sample_words,
                held_out=split != "train",
                unanswerable=0.0 if answerable_only else 0.25,
            )
        else:
            found = load_rows(part, split=split, on_bad_line=problems.append)
        rows += _usable(found, part, problems, answerable_only=answerable_only)
    if not rows:
        raise DataError(f"datasets is {datasets!r}, which names none; give 'path,name,split;...' or 'sample'.")
    rows = [_with_noise(row, noise, seed) for row in rows]
    return sorted(rows, key=lambda row: row["hops"]) if fewer_hops_first else rows


def hops_of(row: Row) -> int:
    """Number of hops: MuSiQue's ids begin with it, else it is the number of supporting paragraphs."""
    named = re.match(r"(\d+)hop", str(row.get("id", "")))
    if named:
        return int(named[1])
    return len(row.get("question_decomposition") or ()) or len(_supporting(row)) or 1


def _usable(rows: list[Row], dataset: str, problems: list[str], *, answerable_only: bool) -> list[Row]:
    usable = []
    total = len(rows) + len(problems)
    for number, row in enumerate(rows, 1):
        problem = _problem(row)
        if problem:
            problems.append(f"row {number} ({row.get('id', 'no id')}): {problem}")
        elif row.get("answerable", True) or not answerable_only:
            usable.append(_prepared(row))
    if problems:
        shown = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        if len(problems) == total:
            raise DataError(
                f"no row of {dataset!r} is one of MuSiQue's: {shown}. "
                "A row has id, question, answer, and paragraphs of idx, title, paragraph_text, is_supporting."
            )
        logger.warning("%d of %d rows of %r are malformed and left out: %s", len(problems), total, dataset, shown)
    if not usable:
        raise DataError(f"{dataset!r} has no answerable question; take the others too with answerable_only=False.")
    return usable


def _problem(row: Row) -> str | None:
    for column in ("question", "answer"):
        value = row.get(column)
        if not isinstance(value, str) or (column == "question" and not value.strip()):
            return f"{column} is {value!r}"
    if not row["answer"].strip() and row.get("answerable", True):
        return "the answer is empty"
    aliases = row.get("answer_aliases")
    if aliases is not None and not (isinstance(aliases, list) and all(isinstance(alias, str) for alias in aliases)):
        return f"answer_aliases is {aliases!r}"
    steps = row.get("question_decomposition")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, dict) for step in steps)):
        return f"question_decomposition is {steps!r}"
    paragraphs = row.get("paragraphs")
    if not isinstance(paragraphs, list) or not paragraphs:
        return "there are no paragraphs"
    kinds = {"idx": int, "title": str, "paragraph_text": str, "is_supporting": bool}
    for paragraph in paragraphs:
        for key, kind in kinds.items():
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get(key), kind):
                return f"a paragraph has no usable {key}"
    if len({paragraph["idx"] for paragraph in paragraphs}) < len(paragraphs):
        return "two paragraphs have one idx"
    if row.get("answerable", True) and not _supporting(row):
        return "no paragraph is supporting"
    return None


def _prepared(row: Row) -> Row:
    answerable = bool(row.get("answerable", True))
    references = [row["answer"], *(row.get("answer_aliases") or ())] if answerable else [UNANSWERABLE]
    keys = ("idx", "title", "paragraph_text", "is_supporting")
    return {
        "id": str(row.get("id", "")),
        "question": row["question"],
        "answer": references[0],
        "references": list(dict.fromkeys(references)),
        "paragraphs": [{key: paragraph[key] for key in keys} for paragraph in row["paragraphs"]],
        "answerable": answerable,
        "hops": hops_of(row),
        "supporting": _supporting(row),
    }


def _supporting(row: Row) -> list[int]:
    """In the order of the hops, as far as the row tells it, then in that of the paragraphs."""
    found = [paragraph["idx"] for paragraph in row["paragraphs"] if paragraph["is_supporting"]]
    named = [step.get("paragraph_support_idx") for step in row.get("question_decomposition") or ()]
    return sorted(found, key=lambda idx: named.index(idx) if idx in named else len(named))


def _with_noise(row: Row, noise: float, seed: int) -> Row:
    others: list[Any] = [p["idx"] for p in row["paragraphs"] if not p["is_supporting"]]
    kept = set(random.Random(f"{seed} {row['id']} {row['question']}").sample(others, round(noise * len(others))))
    paragraphs = [p for p in row["paragraphs"] if p["is_supporting"] or p["idx"] in kept]
    return {**row, "paragraphs": paragraphs}
