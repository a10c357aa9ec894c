from __future__ import annotations

import pytest
from scripted import ScriptedEngine

from rlvr.environments.wordle import feedback
from rlvr.environments.wordle.plugin import rlvr_environment
from rlvr.environments.wordle.words import WORDS
from rlvr.errors import DataError
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.episodes import play
from rlvr.testing.tiny import tiny_tokenizer
from rlvr.types import StopReason


@pytest.mark.parametrize(
    ("guess", "answer", "marks"),
    [
        ("crane", "crane", "GGGGG"),
        ("crane", "toast", "XXGXX"),
        ("toast", "crane", "XXGXX"),
        ("eerie", "crane", "XXYXG"),
        ("speed", "erase", "YXYYX"),
        ("allow", "lilac", "YYGXX"),
        ("geese", "eagle", "YYXXG"),
        ("fuzzy", "crane", "XXXXX"),
    ],
)
def test_feedback_by_hand(guess, answer, marks):
    assert feedback(guess, answer) == marks


def test_words():
    assert all(len(word) == 5 and word.isascii() and word.islower() and word.isalpha() for word in WORDS)
    assert len(set(WORDS)) == len(WORDS) > 400
    env = rlvr_environment()
    train, held_out = ({row["answer"] for row in rows} for rows in (env.train_dataset, env.eval_dataset))
    assert not train & held_out
    assert train | held_out == set(WORDS)
    assert len(rlvr_environment(train_size=7, eval_size=3).eval_dataset) == 3
    assert rlvr_environment(seed=1).train_dataset != env.train_dataset


def run(texts, answer="crane", **options):
    tokenizer = tiny_tokenizer()
    env, end = rlvr_environment(**options), tokenizer.eos_token_id
    row = {**env.train_dataset[0], "answer": answer}
    script = [[*tokenizer.encode(text), end] for text in texts]
    (rollout,) = play(
        env,
        [row],
        engine=ScriptedEngine([script], end_id=end),
        renderer=ChatRenderer(tokenizer),
        max_completion_tokens=2000,
    )
    return rollout.trajectory, env.rubric.score(rollout.trajectory)


def test_a_won_game():
    trajectory, scores = run(["<guess>Toast</guess>", "hm", "I say <guess>crane</guess>"])
    assert trajectory.stop_reason is StopReason.COMPLETED
    assert [turn.replies[0]["content"] for turn in trajectory.turns[:-1]] == [
        "T O A S T\nX X G X X",
        "That is no guess. Write <guess>word</guess>, with five letters.",
    ]
    assert scores == {"solved": 1, "progress": 1, "format": pytest.approx(2 / 3), "turns": 3}


def test_a_lost_game():
    trajectory, scores = run(["<guess>toast</guess>", "<guess>crate</guess>"], guesses=2)
    assert trajectory.stop_reason is StopReason.MAX_TURNS
    assert scores == {"solved": 0, "progress": pytest.approx(0.8), "format": 1, "turns": 2}


def test_rules_name_the_guesses():
    assert "You have 4 guesses" in rlvr_environment(guesses=4).train_dataset[0]["question"]


def test_bad_options():
    with pytest.raises(DataError, match="at least 1"):
        rlvr_environment(guesses=0)
