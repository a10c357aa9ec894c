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
from rlvr.rollout.intervals import interval
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


def test_pass_at_powers_of_two_and_all_attempts(environment, tokenizer):
    """Two of six and six of six pass: pass@2 = 1 - C(4,2)/C(6,2) = 9/15 and 1, pass@4 = 1 - 1/15 · C(4,4) and 1."""
    engine = ScriptedEngine(tokenizer, ["2", "2", "3", "3", "3", "3", *["50"] * 6])
    found = evaluate_policy(environment, local(engine, tokenizer), samples=6)
    rates = {name: value for name, value in found.metrics.items() if name.startswith("pass@")}
    assert rates == pytest.approx(
        {"pass@1": (1 / 3 + 1) / 2, "pass@2": (9 / 15 + 1) / 2, "pass@4": (14 / 15 + 1) / 2, "pass@6": 1.0}
    )
    assert found.intervals.keys() == found.metrics.keys()
    for name, (low, high) in found.intervals.items():
        assert low <= found.metrics[name] <= high
    assert found.intervals["pass@1"] == found.intervals["right"] == interval([[1, 1, 0, 0, 0, 0], [1] * 6])
    assert found.group_intervals == {"level=a": {}, "level=b": {}}  # one example each
    assert found.as_json()["intervals"] == found.intervals


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_which_k(environment, samples, ks):
    rows = list(environment.eval_dataset)[:1]
    ended = Trajectory(rows[0], (), (Turn({"role": "assistant", "content": "2"}),), StopReason.END_OF_TURN)
    scored = [score(environment, 0, ended, tokens=1, attempt=attempt) for attempt in range(samples)]
    metrics = summarise(environment, rows, scored, samples=samples).metrics
    assert [name for name in metrics if name.startswith("pass@")] == [f"pass@{k}" for k in ks]


def test_groups_have_intervals_over_their_own_examples(environment):
    rows = [{"question": "q", "answer": "2", "level": level} for level in "aaab"]
    said = ["2", "3", "2", "2"]
    scored = []
    for index, (row, text) in enumerate(zip(rows, said, strict=True)):
        turn = Turn({"role": "assistant", "content": text})
        scored.append(score(environment, index, Trajectory(row, (), (turn,), StopReason.END_OF_TURN), tokens=1))
    found = summarise(environment, rows, scored, samples=1)
    assert found.group_intervals["level=a"]["right"] == interval([[1], [0], [1]])
    assert found.intervals["pass@1"] == interval([[1], [0], [1], [1]])


def test_a_batch_is_the_same_whatever_is_wanted_of_it(environment, tokenizer):
    seeds, batches = [], []

    def engine_for(seed):
        seeds.append(seed)
        engine = ScriptedEngine(tokenizer, ["2"] * 3)
        batches.append(engine.batches)
        return engine

    player = LocalPlayer(
        engine_for=engine_for, renderer=ChatRenderer(tokenizer), max_completion_tokens=9, batch_size=3, seed=7
    )
    examples = [environment.eval_dataset[0]] * 8
    whole = [played.index for played in player.play(environment, examples, range(8))]
    part = [played.index for played in player.play(environment, examples, [4, 7])]
    assert (whole, part) == (list(range(8)), [4, 7])
    assert seeds[3:] == seeds[1:3]
    assert len(set(seeds)) == 3
    assert batches == [[3], [3], [2], [3], [2]]


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


def test_only_some_examples_are_played_under_their_own_numbers(environment, tokenizer):
    engine = ScriptedEngine(tokenizer, ["50", "0"])
    found = evaluate_policy(environment, local(engine, tokenizer), samples=2, only=[1])
    assert [(item.example, item.attempt) for item in found.trajectories] == [(1, 0), (1, 1)]
    assert (found.examples, found.metrics["pass@1"], list(found.groups)) == (1, 0.5, ["level=b"])


def test_training_examples_in_place_of_held_out_ones_are_told(environment, tokenizer, caplog):
    held_out = evaluate_policy(environment, local(ScriptedEngine(tokenizer, ["2", "50"]), tokenizer))
    assert held_out.as_json()["split"] == "eval"
    assert not caplog.records
    environment.eval_dataset = None
    found = evaluate_policy(environment, local(ScriptedEngine(tokenizer, ["0"]), tokenizer))
    assert found.as_json()["split"] == "train"
    assert [record.getMessage() for record in caplog.records] == [
        "environment 'sums' has no held-out examples: those of the train split are played."
    ]


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


def test_a_reward_function_called_reward_does_not_hide_the_total():
    def reward(trajectory):
        return 1.0

    def form(trajectory):
        return 0.0

    rubric = Rubric((reward, 0.5), (form, 0.5), (WeightedReward(form, 0.0, name="pass@1")))
    env = Environment(name="e", train_dataset=[{"question": "q"}], rubric=rubric)
    found = summarise(env, env.train_dataset, [score(env, 0, Trajectory({}, ()), tokens=1)], samples=1)
    assert found.metrics == {"reward": 0.5, "rewards/reward": 1.0, "form": 0.0, "rewards/pass@1": 0.0, "pass@1": 1.0}
