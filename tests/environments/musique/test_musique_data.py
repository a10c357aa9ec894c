from __future__ import annotations

import json
import logging
import re

import pytest

from rlvr.environments.musique.data import hops_of, load_questions
from rlvr.environments.musique.sample import RELATIONS, sample_questions
from rlvr.errors import DataError
from rlvr.rewards.text import contains_answer, exact_match


def published_row(**changes):
    """A row as MuSiQue publishes it."""
    row = {
        "id": "2hop__1_2",
        "question": "Who wrote the book?",
        "answer": "Ann Lee",
        "answer_aliases": ["A. Lee", "Ann Lee"],
        "answerable": True,
        "paragraphs": [
            {"idx": i, "title": f"T{i}", "paragraph_text": f"text {i}", "is_supporting": i in (3, 7)}
            for i in range(10)
        ],
        "question_decomposition": [{"id": 1}, {"id": 2}],
    }
    return {**row, **changes}


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_published_rows(tmp_path):
    (row,) = load_questions(write(tmp_path / "m.jsonl", [published_row()]))
    assert row["references"] == ["Ann Lee", "A. Lee"]
    assert row["supporting"] == [3, 7]
    assert row["hops"] == 2
    assert len(row["paragraphs"]) == 10
    assert set(row["paragraphs"][0]) == {"idx", "title", "paragraph_text", "is_supporting"}


def test_parquet_and_several_sets(tmp_path):
    import datasets

    datasets.Dataset.from_list([published_row(id="3hop1__1")]).to_parquet(tmp_path / "m.parquet")
    first = write(tmp_path / "m.jsonl", [published_row()])
    rows = load_questions(f"{first};{tmp_path / 'm.parquet'}; sample", sample_size=4)
    assert [row["hops"] for row in rows] == [2, 3, 2, 3, 4, 2]
    ordered = load_questions(f"{first};{tmp_path / 'm.parquet'}; sample", sample_size=4, fewer_hops_first=True)
    assert [row["hops"] for row in ordered] == [2, 2, 2, 3, 3, 4]
    assert len({tuple(sorted(row)) for row in rows}) == 1


@pytest.mark.parametrize(
    ("row", "hops"),
    [
        ({"id": "4hop2__8_9"}, 4),
        ({"id": "x", "question_decomposition": [{}, {}, {}]}, 3),
        ({"id": "x", "question_decomposition": None}, 2),
    ],
)
def test_hops(row, hops):
    assert hops_of(published_row(**row)) == hops


@pytest.mark.parametrize(
    ("named", "order"),
    [((7, 3), [7, 3]), ((3, 7), [3, 7]), ((7, None), [7, 3]), ((99,), [3, 7]), ((), [3, 7]), (None, [3, 7])],
)
def test_supporting_documents_are_hop_by_hop(tmp_path, named, order):
    steps = None if named is None else [{"paragraph_support_idx": idx} for idx in named]
    (row,) = load_questions(write(tmp_path / "m.jsonl", [published_row(question_decomposition=steps)]))
    assert row["supporting"] == order


@pytest.mark.parametrize(("noise", "kept"), [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_noise(tmp_path, noise, kept):
    file = write(tmp_path / "m.jsonl", [published_row(), published_row(id="2hop__9")])
    rows = load_questions(file, noise=noise)
    for row in rows:
        assert [p["idx"] for p in row["paragraphs"] if p["is_supporting"]] == [3, 7]
        assert sum(not p["is_supporting"] for p in row["paragraphs"]) == kept
    assert load_questions(file, noise=noise) == rows
    if noise == 0.5:
        assert rows[0]["paragraphs"] != rows[1]["paragraphs"]
        assert load_questions(file, noise=noise, seed=5) != rows


def test_unanswerable_questions(tmp_path):
    unanswerable = published_row(answerable=False)
    for paragraph in unanswerable["paragraphs"]:
        paragraph["is_supporting"] = False
    file = write(tmp_path / "m.jsonl", [published_row(), unanswerable])
    assert len(load_questions(file)) == 1
    rows = load_questions(file, answerable_only=False)
    assert [row["references"] for row in rows] == [["Ann Lee", "A. Lee"], ["unanswerable"]]
    with pytest.raises(DataError, match="has no answerable question"):
        load_questions(write(tmp_path / "u.jsonl", [unanswerable]))


BAD = [
    ({"question": " "}, "question is ' '"),
    ({"answer": None}, "answer is None"),
    ({"answer": ""}, "the answer is empty"),
    ({"answer_aliases": "Ann"}, "answer_aliases is 'Ann'"),
    ({"answer_aliases": [7]}, "answer_aliases is [7]"),
    ({"question_decomposition": 2}, "question_decomposition is 2"),
    ({"question_decomposition": [None]}, "question_decomposition is [None]"),
    ({"paragraphs": []}, "there are no paragraphs"),
    ({"paragraphs": [{"idx": 0}]}, "a paragraph has no usable title"),
    ({"paragraphs": [{"idx": "0", "title": "a", "paragraph_text": "b", "is_supporting": True}]}, "no usable idx"),
    ({"paragraphs": [{"idx": 0, "title": "a", "paragraph_text": "b", "is_supporting": True}] * 2}, "one idx"),
    ({"paragraphs": [{"idx": 0, "title": "a", "paragraph_text": "b", "is_supporting": False}]}, "is supporting"),
]


@pytest.mark.parametrize(("changes", "problem"), BAD)
def test_malformed_rows_are_counted_and_named(tmp_path, caplog, changes, problem):
    bad = published_row(id="2hop__bad", **changes)
    with caplog.at_level(logging.WARNING):
        rows = load_questions(write(tmp_path / "m.jsonl", [published_row(), bad, "{broken"]))
    assert len(rows) == 1
    (record,) = caplog.records
    assert "2 of 3 rows" in record.message
    assert "row 2 (2hop__bad): " in record.message
    assert problem in record.message
    assert "line 3" in record.message


def test_only_malformed_rows_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no row of .* is one of MuSiQue's: row 1 .*: question is None"):
        load_questions(write(tmp_path / "m.jsonl", [{"text": "x"}]))


@pytest.mark.parametrize(("options", "message"), [({"noise": 1.5}, "noise is 1.5"), ({"datasets": ";"}, "names none")])
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        load_questions(**{"datasets": "sample", **options})


def test_sample_follows_its_facts():
    """Every hop's answer stands in its supporting paragraph, and leads to the next."""
    for row in sample_questions(60, seed=3):
        steps = row["question_decomposition"]
        by_idx = {p["idx"]: p for p in row["paragraphs"]}
        assert len(row["paragraphs"]) == 20
        assert len(steps) == hops_of(row)
        assert sorted(s["paragraph_support_idx"] for s in steps) == sorted(
            p["idx"] for p in row["paragraphs"] if p["is_supporting"]
        )
        assert [p["idx"] for p in row["paragraphs"]] == list(range(20))
        entity = by_idx[steps[0]["paragraph_support_idx"]]["title"]
        assert entity in row["question"]
        for step in steps:
            paragraph = by_idx[step["paragraph_support_idx"]]
            assert paragraph["title"] == entity
            facts = [r.fact.format(x=entity, y=step["answer"]) for r in RELATIONS]
            assert sum(fact in paragraph["paragraph_text"] for fact in facts) == 1
            entity = step["answer"]
        assert entity == row["answer"]
        others = " ".join(p["paragraph_text"] for p in row["paragraphs"] if not p["is_supporting"])
        assert not contains_answer(others, row["answer"])
        assert len({p["title"] for p in row["paragraphs"]}) == 20


def test_sample_size_seed_and_hops():
    assert sample_questions(7, seed=1) == sample_questions(7, seed=1)
    assert sample_questions(7, seed=1) != sample_questions(7, seed=2)
    assert [hops_of(row) for row in sample_questions(5, hops=(2, 5))] == [2, 5, 2, 5, 2]
    assert len(sample_questions(1, paragraphs=4, sentences=1)[0]["paragraphs"]) == 4


def test_a_sample_of_few_words():
    rows = [
        row
        for seed in (0, 1)
        for held_out in (False, True)
        for row in sample_questions(30, seed=seed, hops=(2, 3), paragraphs=6, words=24, held_out=held_out)
    ]
    titles = [p["title"] for row in rows for p in row["paragraphs"]]
    own = {word for title in titles for word in re.sub("The .* of |Port |Republic of ", "", title).split()}
    assert len(own) == 24
    for row in rows:
        assert len({p["title"] for p in row["paragraphs"]}) == 6


def test_sample_splits_never_overlap():
    def starts(held_out, seeds):
        return {
            step["question"]
            for seed in seeds
            for row in sample_questions(150, seed=seed, held_out=held_out)
            for step in row["question_decomposition"][:1]
        }

    assert not starts(False, range(3)) & starts(True, range(3))


def test_unanswerable_sample():
    rows = sample_questions(40, unanswerable=0.5, seed=2)
    missing = [row for row in rows if not row["answerable"]]
    assert 8 < len(missing) < 32
    for row in missing:
        assert not any(
            exact_match(row["answer"], word) for p in row["paragraphs"] for word in p["paragraph_text"].split(". ")
        )
        assert len(row["paragraphs"]) == 19
    assert len(load_questions("sample", answerable_only=False, sample_size=40)) == 40


@pytest.mark.parametrize("options", [{"size": 0}, {"hops": ()}, {"hops": (0,)}, {"paragraphs": 3}, {"sentences": 0}])
def test_samples_that_cannot_be_made(options):
    with pytest.raises(DataError, match="cannot be made"):
        sample_questions(**{"size": 3, **options})


def test_words_that_are_too_few_for_the_paragraphs():
    with pytest.raises(DataError, match=r"names of 79 words are too few for 20 paragraphs.*at least 80"):
        sample_questions(1, words=79)
