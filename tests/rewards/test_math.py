from __future__ import annotations

import threading

import pytest

from rlvr.rewards.math import boxed, math_equal


@pytest.mark.parametrize(
    ("prediction", "answer", "equal"),
    [
        ("so \\boxed{42}", "42", True),
        ("so \\boxed{42}", "43", False),
        ("first \\boxed{41}, no: \\boxed{42}", "42", True),
        ("the result is 42.", "42", True),
        ("<answer>42</answer>", "42", True),
        ("<answer>x = 42</answer>", "42", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{\\dfrac{2}{4}}", "1/2", True),
        ("\\boxed{50\\%}", "0.5", True),
        ("\\boxed{1,000}", "1000", True),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", True),
        ("\\boxed{\\{2, 1\\}}", "\\{1, 2\\}", True),
        ("\\boxed{(1, 2)}", "(2, 1)", False),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", True),
        ("\\boxed{Evelyn}", "Evelyn", True),
        ("\\boxed{Evelyn}", "Anna", False),
        ("\\boxed{(C)}", "C", True),
        ("\\boxed{\\text{ evelyn }.}", "Evelyn", True),
        ("\\boxed{5}", "-5", False),
        ("<answer>5</answer>", "-5", False),
        ("\\boxed{42}", "4.2", False),
        ("\\boxed{12}", "1/2", False),
        ("\\boxed{x+1}", "x-1", False),
        ("\\boxed{(1,2)}", "12", False),
        ("\\boxed{12}", "(1,2)", False),
        ("", "42", False),
        ("\\boxed{}", "42", False),
        ("I have no idea", "42", False),
    ],
)
def test_equal_answers(prediction, answer, equal):
    assert math_equal(prediction, answer) is equal


def test_off_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(math_equal("\\boxed{1/2}", "0.5")))
    thread.start()
    thread.join(60)
    assert found == [True]


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("\\boxed{a} and \\boxed{ b }", "b"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{\\frac{1}{2}", None),
        ("nothing", None),
    ],
)
def test_boxed(text, inner):
    assert boxed(text) == inner
