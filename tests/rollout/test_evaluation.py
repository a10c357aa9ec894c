"""Evaluation against numbers worked out by hand, with a scripted engine instead of a model."""

from contextlib import contextmanager
from itertools import combinations

import pytest

from rlvr.environments.base import Environment
from rlvr.errors import ConfigError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.engine import SampledTurn
from rlvr.rollout.evaluation import LocalPlayer, evaluate_policy, pass_at_k, score, summarise
from rlvr.types import StopReason, Trajectory, Turn


class ScriptedEngine:
    """Says what it was told to, in the order in which sequences are submitted."""

    name = "scripted"

    def __init__(self, tokenizer, answers):
        self._ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        self._end = tokenizer.eos_token_id
        self.batches = []

    @contextmanager
    def open(self, prompt_ids, *, max_completion_tokens):
        self.batches.append(len(prompt_ids))
        yield _Session(self)

    def answer(self):
        return [*self._ids.pop(0), self._end]


class _Session:
    def __init__(self, engine):
        self._engine, self._waiting = engine, []

    @property
    def pending(self):
        return len(self._waiting)

    def submit(self, index, new_ids, max_new_tokens):
        self._waiting.append(index)

    def step(self):
        turns = [SampledTurn(index, self._engine.answer(), True) for index in sorted(self._waiting)]
        self._waiting = []
        return turns


def right(trajectory):
    return float(trajectory.text == trajectory.example["answer"])


def length(trajectory):
    return None if trajectory.text == "" else float(len(trajectory.text))


def local(engine, tokenizer, batch_size=64):
    return LocalPlayer(
        engine_for=lambda seed: engine,
        renderer=ChatRenderer(tokenizer),
        max_completion_tokens=9,
        batch_size=batch_size,
    )


@pytest.fixture
def environment():
    rows = [{"question": "1+1", "answer": "2", "level": "a"}, {"question": "20+30", "answer": "50", "level": "b"}]
    return Environment(
        name="sums",
        train_dataset=[{"question": "0+0", "answer": "0", "level": "a"}],
        eval_dataset=rows,
        rubric=Rubric(WeightedReward(right, 1.0), WeightedReward(length, 0.1)),
        group_metrics_by="level",
    )


def test_means_pass_rates_and_groups(environment, tokenizer):
    engine = ScriptedEngine(tokenizer, ["2", "3", "50", "50"])
    found = evaluate_policy(environment, local(engine, tokenizer, batch_size=3), samples=2)
    assert found.metrics == pytest.approx(
        {"right": 3 / 4, "length": 6 / 4, "reward": 3 / 4 + 0.15, "pass@1": 0.75, "pass@2": 1.0}
    )
    assert found.groups["level=a"]["pass@1"] == 0.5
    assert found.groups["level=b"]["pass@1"] == 1.0
    assert found.stop_reasons == {"end_of_turn": 1.0}
    assert (found.examples, found.samples, found.excluded, found.tokens) == (2, 2, 0, 2 + 2 + 3 + 3)
    assert [item.example for item in found.trajectories] == [0, 0, 1, 1]
    assert engine.batches == [3, 1]


def test_the_limit_takes_the_first_examples_and_progress_is_told(environment, tokenizer):
    told = []
    found = evaluate_policy(
        environment,
        local(ScriptedEngine(tokenizer, ["2"]), tokenizer),
        limit=1,
        on_progress=lambda done, of: told.append((done, of)),
    )
    assert found.examples == 1
    assert found.metrics["pass@1"] == 1.0
    assert "pass@2" not in found.metrics
    assert told == [(1, 1)]


def test_failed_infrastructure_is_excluded_and_counted_never_reward_zero(environment):
    rows = list(environment.eval_dataset)
    ended = Turn({"role": "assistant", "content": "2"})
    good = Trajectory(rows[0], (), (ended,), StopReason.END_OF_TURN)
    broken = Trajectory(rows[0], (), (ended,), StopReason.INFRASTRUCTURE)
    scored = [score(environment, 0, good, tokens=1), score(environment, 0, broken, tokens=1)]
    found = summarise(environment, rows[:1], scored, samples=2)
    assert found.excluded == 1
    assert found.metrics["right"] == found.metrics["pass@1"] == 1.0
    assert "pass@2" not in found.metrics  # no example has two attempts that count
    assert found.stop_reasons == {"end_of_turn": 0.5, "infrastructure": 0.5}


def test_a_metric_that_does_not_apply_is_left_out_of_its_mean(environment):
    rows = list(environment.eval_dataset)
    silent = Trajectory(rows[0], (), (Turn({"role": "assistant", "content": ""}),), StopReason.END_OF_TURN)
    found = summarise(environment, rows[:1], [score(environment, 0, silent, tokens=1)], samples=1)
    assert "length" not in found.metrics
    assert found.metrics["reward"] == 0.0


@pytest.mark.parametrize("attempts", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_success(attempts):
    for passed in range(attempts + 1):
        outcomes = [True] * passed + [False] * (attempts - passed)
        for k in range(1, attempts + 1):
            subsets = [any(chosen) for chosen in combinations(outcomes, k)]
            assert pass_at_k(attempts, passed, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_needs_k_attempts():
    with pytest.raises(ConfigError, match="pass@3 was asked for with 2 attempts"):
        pass_at_k(2, 1, 3)
