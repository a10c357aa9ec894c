from __future__ import annotations

import csv
import json

import pytest

import rlvr
from rlvr import quickstart
from rlvr.environments.dataset import from_trl
from rlvr.environments.dataset.plugin import rlvr_environment
from rlvr.errors import DataError, EnvironmentDefinitionError, RewardError
from rlvr.types import Trajectory, Turn

ROWS = [{"question": f"Capital {i}?", "answer": f"The City {i}", "year": i} for i in range(20)]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "my.jsonl", ROWS)


def scores(env, text, row=None):
    row = row or env.train_dataset[0]
    turn = Turn({"role": "assistant", "content": text})
    return env.rubric.score(Trajectory(row, tuple(env.messages(row)), (turn,)))


def test_rows_become_prompts_and_references(file):
    env = rlvr_environment(datasets=file, system_prompt="Be short.", eval_fraction=0.25)
    assert (len(env.train_dataset), len(env.eval_dataset)) == (15, 5)
    assert {row["question"] for row in [*env.train_dataset, *env.eval_dataset]} == {row["question"] for row in ROWS}
    row = env.train_dataset[0]
    assert row["year"] == ROWS[row["year"]]["year"]
    assert env.messages(row) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": row["question"]},
    ]
    again = rlvr_environment(datasets=file, eval_fraction=0.25)
    assert again.eval_dataset == env.eval_dataset
    assert rlvr_environment(datasets=file, eval_fraction=0.25, seed=1).eval_dataset != env.eval_dataset
    assert rlvr_environment(datasets=file, eval_fraction=0).eval_dataset is None


@pytest.mark.parametrize(
    ("reward", "name", "text", "value"),
    [
        ("exact-match", "exact_match", "city 3.", 1),
        ("exact-match", "exact_match", "I think: <answer>City 3</answer>", 1),
        ("exact-match", "exact_match", "I think: City 3", 0),
        ("f1", "f1", "big city", 0.5),
        ("contains", "contains", "I think: City 3!", 1),
        ("contains", "contains", "City 33", 0),
    ],
)
def test_text_rewards(file, reward, name, text, value):
    env = rlvr_environment(datasets=file, reward=reward)
    row = {"prompt": "q", "references": ["The City 3"]}
    assert scores(env, text, row) == {name: pytest.approx(value)}


def test_the_same_question_is_never_on_both_sides(tmp_path):
    file = write_jsonl(tmp_path / "twice.jsonl", ROWS * 2)
    env = rlvr_environment(datasets=file, eval_fraction=0.3)
    sides = [{row["question"] for row in rows} for rows in (env.train_dataset, env.eval_dataset)]
    assert not sides[0] & sides[1]
    assert (len(env.train_dataset), len(env.eval_dataset)) == (28, 12)


def test_every_kind_of_file(tmp_path):
    import datasets

    rows = [{"question": "q", "answer": "007"}, {"question": "r", "answer": "8"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "a.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    for kind in ("json", "jsonl", "parquet", "csv"):
        env = rlvr_environment(datasets=str(tmp_path / f"a.{kind}"), eval_fraction=0)
        assert [row["references"] for row in env.train_dataset] == [["007"], ["8"]], kind
    several = ";".join(str(tmp_path / f"a.{kind}") for kind in ("json", "csv"))
    assert len(rlvr_environment(datasets=several, eval_fraction=0).train_dataset) == 4


def test_a_folder_for_load_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "data" / "test.jsonl", ROWS[3:5])
    folder = str(tmp_path / "data")
    env = rlvr_environment(datasets=folder, eval_datasets=folder)
    assert [row["answer"] for row in env.train_dataset] == ["The City 0", "The City 1", "The City 2"]
    assert [row["answer"] for row in env.eval_dataset] == ["The City 3", "The City 4"]
    env = rlvr_environment(datasets=f"{folder},,test", eval_fraction=0)
    assert [row["answer"] for row in env.train_dataset] == ["The City 3", "The City 4"]


def test_columns_and_kinds_of_answers(tmp_path):
    rows = [
        {"ask": "a", "gold": 5},
        {"ask": "b", "gold": ["x", "y"]},
        {"ask": [{"role": "user", "content": "c"}], "gold": 1.5},
    ]
    file = write_jsonl(tmp_path / "c.jsonl", rows)
    env = rlvr_environment(datasets=file, question_column="ask", answer_column="gold", eval_fraction=0)
    assert [row["references"] for row in env.train_dataset] == [["5"], ["x", "y"], ["1.5"]]
    assert env.messages(env.train_dataset[2]) == [{"role": "user", "content": "c"}]


MODULE = """
def length(trajectory):
    return float(len(trajectory.text))

def years(completions, year, **columns):
    return [float(completion[-1]["content"] == str(y)) for completion, y in zip(completions, year)]

def short(prompts, completions):
    return [None for completion in completions]

def wrong(completions):
    return 1.0

number = 3
"""


def test_rewards_of_ones_own(file, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert scores(rlvr_environment(datasets=file, reward="my_rewards:length"), "abc") == {"length": 3.0}
    env = rlvr_environment(datasets=file, reward="my_rewards.py:years")
    year = env.train_dataset[0]["year"]
    assert scores(env, str(year)) == {"years": 1.0}
    assert scores(env, "x") == {"years": 0.0}
    assert scores(rlvr_environment(datasets=file, reward="my_rewards:short"), "abc") == {"short": None}
    with pytest.raises(RewardError, match="'wrong' raised ValueError: one completion was given"):
        scores(rlvr_environment(datasets=file, reward="my_rewards:wrong"), "abc")
    with pytest.raises(EnvironmentDefinitionError, match="'my_rewards:number' is of type int; name a function"):
        rlvr_environment(datasets=file, reward="my_rewards:number")


def test_a_function_needs_no_answers(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    env = rlvr_environment(datasets=file, reward=f"{tmp_path / 'my_rewards.py'}:length", eval_fraction=0)
    assert [row["prompt"] for row in env.train_dataset] == ["a", "b"]


def test_a_function_sees_the_columns_as_they_are(tmp_path):
    (tmp_path / "mine.py").write_text("def cited(completions, references):\n    return [len(references[0])]\n")
    reward = f"{tmp_path / 'mine.py'}:cited"
    file = write_jsonl(tmp_path / "r.jsonl", [{"question": "a", "references": ["x", "y", "z"]}])
    assert scores(rlvr_environment(datasets=file, reward=reward, eval_fraction=0), "abc") == {"cited": 3.0}
    file = write_jsonl(tmp_path / "p.jsonl", [{"ask": "a", "prompt": "b", "answer": "c"}])
    with pytest.raises(DataError, match=r"has a column 'prompt', .* and the questions in 'ask' would replace it"):
        rlvr_environment(datasets=file, reward=reward, question_column="ask")
    env = rlvr_environment(datasets=file, question_column="ask", eval_fraction=0)  # exact match reads no prompt
    assert env.train_dataset[0]["prompt"] == "a"


def test_from_trl_gives_the_whole_completion():
    seen = {}

    def reward(prompts, completions, answer, **rest):
        seen.update(prompts=prompts, completions=completions, answer=answer, rest=rest)
        return [0.5]

    turn = Turn({"role": "assistant", "content": "hi"}, replies=({"role": "user", "content": "yes?"},))
    trajectory = Trajectory({"answer": "a", "extra": 1}, ({"role": "user", "content": "q"},), (turn,))
    assert from_trl(reward)(trajectory) == 0.5
    assert seen == {
        "prompts": [[{"role": "user", "content": "q"}]],
        "completions": [[{"role": "assistant", "content": "hi"}, {"role": "user", "content": "yes?"}]],
        "answer": ["a"],
        "rest": {"extra": [1]},
    }


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "answer": "b"}], {}, "no column 'question' or 'prompt'; its columns: text, answer"),
        ([{"question": "a", "label": "b"}], {}, "no column 'answer'; its columns: question, label"),
        ([{"question": "a", "answer": "b"}], {"question_column": "ask"}, "no column 'ask'"),
        (
            [{"question": "a", "answer": "b"}, {"question": "", "answer": "b"}],
            {},
            "row 2 .* has '' in 'question'",
        ),
        ([{"question": 5, "answer": "b"}], {}, "row 1 .* has 5 in 'question'"),
        ([{"question": "a", "answer": None}], {}, "row 1 .* has None in 'answer'"),
        ([{"question": "a", "answer": " "}], {}, "has ' ' in 'answer'"),
        ([{"question": "a", "answer": []}], {}, r"has \[\] in 'answer'"),
        ([{"question": "a", "answer": {"x": 1}}], {}, "has {'x': 1} in 'answer'"),
        ([{"question": "a", "answer": True}], {}, "has True in 'answer'"),
        ([{"question": "a"}, {"question": "b", "answer": "c"}], {}, "row 1 .* has None in 'answer'"),
        ([{"question": "a\ud800", "answer": "b"}], {}, r"row 1 .* has 'a\\ud800' in 'question', and half a surrogate"),
        ([{"prompt": [{"role": "user", "content": "\udc00"}], "answer": "b"}], {}, "row 1 .* half a surrogate pair"),
        ([], {}, "has no rows"),
        (ROWS, {"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        (ROWS, {"eval_datasets": "missing.jsonl"}, "there is no file 'missing.jsonl'"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, rows, options, message):
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message):
        rlvr_environment(datasets=file, **options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"question": 1}\n{oops', "line 2 of .* is not JSON"),
        ("a.jsonl", "[1]", "line 1 of .* is no JSON object"),
        ("a.json", '{"question": 1}', "must hold a list of objects"),
        ("a.json", "{", "cannot be read"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.csv", "question,answer\na,b,c\n", "row 2 of .* another number of fields"),
        ("a.csv", "question,answer\n", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        rlvr_environment(datasets=str(tmp_path / name))


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("", "needs --datasets"),
        (" ; ", "give 'path"),
        ("a,b,c,d", "cannot be read; write 'path'"),
        ("no/such/folder/here", "cannot be loaded"),
    ],
)
def test_names_that_cannot_be_used(datasets, message):
    with pytest.raises(DataError, match=message):
        rlvr_environment(datasets=datasets)


def test_a_local_file_is_taken_whole_and_a_part_of_it_is_refused(file):
    for harmless in (file, f"{file},,", f"{file},default,train"):
        assert len(rlvr_environment(datasets=harmless, eval_fraction=0).train_dataset) == len(ROWS)
    for part in (f"{file},default,test", f"{file},,train[:5]", f"{file},main"):
        with pytest.raises(DataError, match="is a local file, which has no name and no split"):
            rlvr_environment(datasets=part)
    with pytest.raises(DataError, match="is a local file"):
        rlvr_environment(datasets=file, eval_datasets=f"{file},,test")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("exact_match", "unknown reward 'exact_match'; allowed: exact-match, f1, contains, or"),
        ("no_such_module_here:f", "cannot be loaded: ModuleNotFoundError"),
        ("missing.py:f", "cannot be loaded"),
        ("json:f", "module 'json' has no 'f'; it has: .*loads"),
        ("json:", "names no object"),
    ],
)
def test_rewards_that_cannot_be_used(file, reward, message):
    with pytest.raises(EnvironmentDefinitionError, match=message):
        rlvr_environment(datasets=file, reward=reward)


def test_whole_numbers_that_a_file_keeps_as_floats_are_whole_numbers(tmp_path):
    env = rlvr_environment(datasets=write_jsonl(tmp_path / "n.jsonl", [{"question": "6*7?", "answer": 42.0}] * 2))
    row = env.train_dataset[0]
    assert row["references"] == ["42"]
    for text, right in (("42", 1), ("42.0", 1), ("420", 0), ("-42", 0)):
        assert scores(env, text, row)["exact_match"] == right


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_strangers_file_is_learned(tmp_path):
    """The quickstart's problems as a user might have them: two files, columns of other names."""
    settings = quickstart.prepare(tmp_path / "model")
    sums = rlvr.load_environment("arithmetic", **settings.pop("env_options"))
    for name, rows in (("train", sums.train_dataset), ("held-out", sums.eval_dataset)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"sum": row["question"], "total": row["answer"]} for row in rows])
    run = rlvr.train(
        **{**settings, "env": "dataset"},
        env_options={
            "datasets": str(tmp_path / "train.jsonl"),
            "eval_datasets": str(tmp_path / "held-out.jsonl"),
            "question_column": "sum",
            "answer_column": "total",
        },
        output_dir=tmp_path / "run",
        report_to="none",
    )
    before, after = run.summary["eval_before"]["exact_match"], run.summary["eval_after"]["exact_match"]
    assert 0.2 <= before <= 0.6
    assert after >= before + 0.3
