"""Sharded training takes the plain paths, which is known before anything is sharded."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from tests_support import grpo_config

from rlvr.errors import UnsupportedSettingError
from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer

pytestmark = pytest.mark.both


def trainer_with(folder, tokenizer, *, fsdp=False, zero_stage=0, **arguments):
    """As accelerate sets a trainer up, of which a CPU has neither: sharding itself comes when training begins."""

    class SetUp(EnhancedGRPOTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = fsdp
            if zero_stage:
                own, plugin = self.accelerator, SimpleNamespace(zero_stage=zero_stage)
                state = SimpleNamespace(deepspeed_plugin=plugin)
                self.accelerator = Proxy(own, state)

    return SetUp(
        model=tiny_model(), processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        reward_funcs=lambda completions, **_: [0.0] * len(completions), args=grpo_config(folder), **arguments,
    )  # fmt: skip


class Proxy:
    """An accelerator with another state."""

    def __init__(self, accelerator, state):
        self._accelerator, self.state = accelerator, state

    def __getattr__(self, name):
        return getattr(self._accelerator, name)


SHARDING = [({"fsdp": True}, "FSDP shards the weights"), ({"zero_stage": 3}, "DeepSpeed ZeRO-3 shards the weights")]


@pytest.mark.parametrize(("sharding", "reason"), SHARDING)
def test_both_paths_fall_back_and_say_why(tmp_path, tokenizer, caplog, sharding, reason):
    trainer = trainer_with(tmp_path, tokenizer, **sharding)
    assert trainer.engine.name == "generate"
    assert not trainer.shares_prefix
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rlvr")] == [
        f"every completion computes its prompt again in training: {reason}.",
        f"rollouts use plain generate, not the grouped engine: {reason}.",
    ]


@pytest.mark.parametrize("asked", [{"shared_prefix": "on"}, {"rollout_engine": "grouped"}])
@pytest.mark.parametrize(("sharding", "reason"), SHARDING)
def test_asked_for_by_name_they_are_errors(tmp_path, tokenizer, sharding, reason, asked):
    with pytest.raises(UnsupportedSettingError, match=reason):
        trainer_with(tmp_path, tokenizer, **sharding, **asked)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_zero_stages_that_leave_the_weights_whole_keep_both(tmp_path, tokenizer, zero_stage):
    trainer = trainer_with(tmp_path, tokenizer, zero_stage=zero_stage)
    assert trainer.engine.name == "grouped"
    assert trainer.shares_prefix
