"""The trajectories table, read back from what real W&B wrote offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer

pytestmark = pytest.mark.both


def tables(folder: Path) -> list[dict]:
    """The increments that W&B wrote, in order."""
    files = sorted(
        folder.glob("wandb/offline-run-*/files/media/table/trajectories_*.table.json"),
        key=lambda file: file.stat().st_mtime_ns,
    )
    return [json.loads(file.read_text()) for file in files]


def test_a_training_run_grows_the_table_and_overwrites_nothing(tmp_path, tokenizer, monkeypatch):
    import trl
    import wandb
    from datasets import Dataset
    from peft import LoraConfig

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    records = []

    def length(completions, **_):
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = EnhancedGRPOTrainer(
        model=tiny_model(),
        processing_class=tokenizer,
        reward_funcs=[length, lambda completions, **_: [None] * len(completions)],
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(4)]),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        trajectory_sinks=[records.extend],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, num_generations=2, max_steps=3,
            max_completion_length=4, logging_steps=1, save_strategy="no", report_to="wandb", run_name="test",
            disable_tqdm=True, bf16=False, use_cpu=True, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    trainer.train()
    wandb.finish()

    increments = tables(tmp_path)
    assert len(increments) == 3  # one a step
    columns = increments[0]["columns"]
    assert columns == [
        "step", "phase", "group", "prompt", "completion", "reward", "advantage", "stop_reason", "adapter",
        "rewards/length", "rewards/<lambda>",
    ]  # fmt: skip
    rows = [dict(zip(columns, row, strict=True)) for table in increments for row in table["data"]]
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row["adapter"] for row in rows] == [record.adapter for record in records]
    assert all(len(row["adapter"]) == 64 for row in rows)
    assert len(records) == len(rows)
    for row, record in zip(rows, records, strict=True):
        assert row["prompt"] == f"[user] {record.prompt[0]['content']}"
        assert row["completion"] == f"[assistant] {record.completion[0]['content']}"
        assert row["reward"] == row["rewards/length"] == len(record.completion[0]["content"])
        assert row["rewards/<lambda>"] is None
        assert row["advantage"] == pytest.approx(record.advantage)
