"""Cases written out by hand; the expected values follow the official SQuAD and MuSiQue evaluation scripts."""

from __future__ import annotations

import pytest

from rlvr.rewards.text import answer_in, contains_answer, exact_match, f1, normalize_answer, same_answer, tagged


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("a an the", ""),
        ("An apple a day", "apple day"),
        ("theatre and another", "theatre and another"),
        ("U.S.A.", "usa"),
        ("rock-'n'-roll", "rocknroll"),
        ("1,000", "1000"),
        ("3.14", "314"),
        ("Zürich – 'Altstadt'", "zürich – altstadt"),
        ("“quoted”", "“quoted”"),
        ("It's a-b", "its ab"),
        ("THE ÉCOLE", "école"),
        ("", ""),
        ("?!", ""),
        ("\u00a0x\u2009y\n", "x y"),
    ],
)
def test_normalize(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "references", "em", "f"),
    [
        ("the Beatles", "Beatles", 1, 1),
        ("John Lennon", ["Lennon", "John Winston Lennon"], 0, 0.8),
        ("J. Lennon", ["John", "J Lennon"], 1, 1),
        ("in the year 1968", "1968", 0, 0.5),
        ("1,968", "1968", 1, 1),
        ("north north west", "north west", 0, 0.8),
        ("north", "south", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("", "Paris", 0, 0),
        ("Paris", "", 0, 0),
        ("Paris", ["", "paris."], 1, 1),
        ("x", [], 0, 0),
        ("São Paulo", "sao paulo", 0, 0.5),
        ("Köln", "KÖLN", 1, 1),
    ],
)
def test_exact_match_and_f1(prediction, references, em, f):
    assert exact_match(prediction, references) == em
    assert f1(prediction, references) == pytest.approx(f)


def test_contains():
    assert contains_answer("It was the Eiffel Tower.", "eiffel tower") == 1
    assert contains_answer("towering", "tower") == 0
    assert contains_answer("anything", ["", "the"]) == 0
    assert contains_answer("b", ["a", "b"]) == 1


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("x <answer> 3 </answer> y", "3"),
        ("<answer>1</answer><answer>2\n</answer>", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("<answer>1", None),
        ("1</answer>", None),
    ],
)
def test_tags(text, inner):
    assert tagged(text) == inner
    assert answer_in(text) == (text.strip() if inner is None else inner)


def test_other_tags():
    assert tagged("<a.b>1</a.b>", "a.b") == "1"
    assert tagged("<axb>1</axb>", "a.b") is None


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("42", "42.0", True),
        ("1,000", "1000", True),
        (" $3.50. ", "3.5", True),
        ("0.5", "1/2", True),
        ("2e-3", "0.002", True),
        ("\u22125", "-5", True),  # with the sign that books print
        ("5", "-5", False),
        ("42", "4.2", False),
        ("12", "1/2", False),
        ("420", "42.0", False),
        ("12 apples", "12", False),
        ("1/0", "1", False),
        ("1.5/2", "0.75", False),  # no way to write a number
        ("The City", "city!", True),  # a text, as exact match has it
        ("-5", "minus five", False),
    ],
)
def test_numbers_are_compared_by_value(prediction, reference, same):
    assert same_answer(prediction, ["something else", reference]) == float(same)
