import pytest

from rlvr.environments.base import Environment
from rlvr.errors import RunFolderError
from rlvr.rewards.rubric import Rubric
from rlvr.rollout.attempts import AttemptFile

ROWS = [{"question": "1+1"}]
ENVIRONMENT = Environment(name="sums", train_dataset=ROWS, rubric=Rubric(lambda trajectory: 1.0))


def begin(path, **env_options):
    file = AttemptFile(path, resume=True)
    done = file.done(ENVIRONMENT, ROWS, {"samples": 1, "env_options": env_options})
    file.begin(done)
    return file.settings_path


def test_secrets_are_neither_stored_nor_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    settings = begin(path, api_key="hush-1", judge={"password": "hush-2"}, levels=2)
    assert "hush" not in settings.read_text()
    begin(path, api_key="hush-3", judge={"password": "hush-2"}, levels=2)
    with pytest.raises(RunFolderError, match=r"env_options was .*'levels': 2.* and is .*'levels': 3") as error:
        begin(path, api_key="hush-3", judge={"password": "hush-4"}, levels=3)
    assert "hush" not in str(error.value)


def test_a_secret_that_an_earlier_version_stored_is_taken_out(tmp_path):
    path = tmp_path / "a.jsonl"
    settings = begin(path, api_key="hush")
    settings.write_text(settings.read_text().replace("(not kept)", "hush"))
    begin(path, api_key="hush")
    assert "hush" not in settings.read_text()
