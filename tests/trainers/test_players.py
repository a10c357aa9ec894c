"""What samples outside training."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

import rlvr
from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import Capabilities
from rlvr.errors import UnsupportedSettingError
from rlvr.rollout.engine import SamplingSettings
from rlvr.testing.tiny import tiny_model
from rlvr.trainers.players import sampling_engine


@pytest.fixture
def policy(tokenizer):
    return SimpleNamespace(model=tiny_model(layers=1), tokenizer=tokenizer)


@pytest.mark.parametrize("asked", ["auto", "vllm"])
def test_plain_generate_where_grouped_cannot_run_says_why_once(policy, asked, caplog):
    policy.model.config.model_type = f"odd-{asked}"  # each reason is said once in a process
    names = [sampling_engine(policy, SamplingSettings(), asked=asked)(0).name for _ in range(2)]
    assert names == ["generate", "generate"]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"outside training plain generate samples, not the grouped engine: Qwen2ForCausalLM (odd-{asked}) is not among"
    )


def test_what_was_asked_for_is_taken_without_a_word(policy, caplog):
    expected = {"auto": "grouped", "grouped": "grouped", "generate": "generate"}
    for asked, name in expected.items():
        assert sampling_engine(policy, SamplingSettings(), asked=asked)(0).name == name
    policy.model.config.model_type = "odd"
    assert sampling_engine(policy, SamplingSettings(), asked="generate")(0).name == "generate"
    assert not caplog.records
    with pytest.raises(UnsupportedSettingError, match=r"\(odd\) is not among"):
        sampling_engine(policy, SamplingSettings(), asked="grouped")


class TakesAnything(HFBackend):
    """Claims no quantization, and loads without one whatever is asked."""

    name = "takes-anything"

    def capabilities(self):
        return Capabilities()

    def load_policy(self, settings):
        return super().load_policy(replace(settings, quantization="none"))


@pytest.mark.parametrize("command", [rlvr.evaluate, rlvr.preflight])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_what_a_backend_does_not_claim_is_refused_with_an_adapter_too(tmp_path, model_folder, command, adapted):
    backend = TakesAnything()
    given = {}
    if adapted:
        backend.save(rlvr.load_policy(str(model_folder), backend=backend), tmp_path / "adapter")
        given = {"adapter": tmp_path / "adapter"}
    with pytest.raises(UnsupportedSettingError, match="'takes-anything' cannot honour quantization='4bit'"):
        command("arithmetic", str(model_folder), backend, load_in_4bit=True, max_prompt_length=64, **given)
