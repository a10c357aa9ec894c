from dataclasses import fields

import numpy as np
import pytest
import yaml

from rlvr.config import (
    EVALUATION_SETTINGS,
    TrainSettings,
    merge,
    option_type,
    read_config,
    settings_from,
)
from rlvr.errors import ConfigError
from rlvr.options import option_default

ISSUE_OPTIONS = """
    --batch-size --num-generations --learning-rate --max-steps --num-epochs --gradient-accumulation-steps
    --max-prompt-length --max-tokens --temperature --top-p --min-p --bf16 --fp16 --dtype --gradient-checkpointing
    --lora-r --lora-alpha --lora-dropout --peft --kl-beta --loss-type --scale-rewards --num-iterations
    --lr-scheduler-type --warmup-steps --max-grad-norm --weight-decay --gpu-memory-utilization --load-in-4bit
    --output-dir --run-name --report-to --resume-from-checkpoint --push-to-hub --seed --prompts-per-step
    --model --backend
"""


def test_every_promised_option_exists():
    promised = {flag[2:].replace("-", "_") for flag in ISSUE_OPTIONS.split()}
    assert promised <= {definition.name for definition in fields(TrainSettings)}
    assert set(EVALUATION_SETTINGS) <= {definition.name for definition in fields(TrainSettings)}


def test_every_option_has_help_a_group_and_a_default_of_its_own_type():
    for definition in fields(TrainSettings):
        kind, optional = option_type(definition)
        default = option_default(definition)
        assert definition.metadata["help"]
        assert definition.metadata["group"]
        assert (default is None and optional) or type(default) is kind, definition.name


def test_defaults_are_valid_and_resolve():
    settings = TrainSettings().resolved()
    assert (settings.batch_size, settings.gradient_accumulation_steps, settings.prompts_per_step) == (None, None, 8)
    planned = settings.planned()
    assert (planned.batch_size, planned.gradient_accumulation_steps, planned.prompts_per_step) == (16, 4, 8)
    assert settings.planned(shares=False).batch_size == 8
    assert TrainSettings(shared_prefix="off").planned().batch_size == 8
    assert TrainSettings(backend="unsloth").planned().batch_size == 8
    assert settings.learning_rate == 1e-5
    assert TrainSettings(peft=False).resolved().learning_rate == 1e-6
    assert settings.resolved() == settings


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainSettings(num_generations=1, max_tokens=0, learning_rate=-1e-5, top_p=1.5, loss_type="grpoo")
    assert len(caught.value.problems) == 5
    text = str(caught.value)
    for words in ("5 settings", "num_generations is 1", "two or more", "max_tokens is 0", "learning_rate is -1e-05"):
        assert words in text
    assert "above 0 and at most 1" in text
    assert "Did you mean 'grpo'?" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_size": "eight"}, "batch_size is 'eight'; it must be a whole number."),
        ({"batch_size": 1.5}, "batch_size is 1.5; it must be a whole number."),
        ({"batch_size": True}, "batch_size is True; it must be a whole number."),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number."),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be above 0."),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be above 0 and finite."),
        ({"temperature": 0}, "temperature is 0.0; it must be above 0."),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it must be at least 0 and below 1."),
        ({"peft": "no"}, "peft is 'no'; it must be true or false."),
        ({"model": 7}, "model is 7; it must be text."),
        ({"env_options": [1]}, "env_options is [1]; it must be a mapping."),
        ({"num_generations": None}, "num_generations is None; it must be a whole number."),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both on; choose one."),
        ({"bf16": True, "dtype": "float32"}, "bf16 is on and dtype is 'float32'; leave one out."),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both on; choose one."),
        ({"peft": False, "load_in_4bit": True}, "quantized weights cannot be trained"),
        ({"peft": False, "fp16": True}, "float16 weights cannot be trained in full"),
        (
            {"vllm_server": "http://a:1"},
            "vllm_server is 'http://a:1' and rollout_engine is 'auto'; use --rollout-engine",
        ),
        ({"vllm_server": "a:1", "rollout_engine": "vllm"}, "vllm_server is 'a:1'; it must be an address such as http"),
        (
            {"vllm_server": "http://a:1", "rollout_engine": "vllm", "gpu_memory_utilization": 0.5},
            "gpu_memory_utilization is 0.5: a server takes its share when it is started. Give it there.",
        ),
        (
            {"vllm_server": "http://a:1", "rollout_engine": "vllm", "fast_inference": "on"},
            "fast_inference is 'on', which is another vLLM; leave one out.",
        ),
        (
            {"vllm_server": "http://me:hush@a:1", "rollout_engine": "vllm"},
            "vllm_server has a user or a password in it, which TRL would store with its arguments",
        ),
        ({"temperature": 10**400}, "it must be a number."),
        ({"seed": 2**32}, "seed is 4294967296; it must be at least 0 and at most 4294967295."),
        ({"report_to": "auto,wandb"}, "report_to is 'auto,wandb'; allowed: auto, none"),
    ],
)
def test_values_that_cannot_be_used(given, says):
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**given)
    assert says in str(caught.value)


def test_values_are_read_as_yaml_and_paths_write_them(tmp_path):
    settings = TrainSettings(
        learning_rate="1e-5",
        num_epochs=2,
        batch_size=8.0,
        output_dir=tmp_path,
        lora_target_modules=["q_proj", "v_proj"],
    )
    assert settings.learning_rate == 1e-5
    assert type(TrainSettings(learning_rate=np.float32(0.5)).learning_rate) is float
    assert settings.num_epochs == 2.0
    assert settings.batch_size == 8
    assert settings.output_dir == str(tmp_path)
    assert settings.lora_settings().target_modules == ("q_proj", "v_proj")


def test_model_and_lora_settings_follow():
    settings = TrainSettings(model="m", load_in_4bit=True, bf16=True, max_prompt_length=100, max_tokens=28, lora_r=4)
    model = settings.model_settings()
    assert (model.quantization, model.dtype, model.max_seq_length) == ("4bit", "bfloat16", 128)
    assert settings.lora_settings().r == 4
    assert settings.lora_settings().target_modules == "all-linear"
    full = TrainSettings(model="m", peft=False)
    assert full.lora_settings() is None
    assert full.model_settings().full_finetuning


def test_later_layers_win_and_unknown_names_are_all_said():
    settings = settings_from({"batch-size": 4, "seed": 1, "env": "a"}, {"seed": 2})
    assert (settings.batch_size, settings.seed) == (4, 2)
    with pytest.raises(ConfigError) as caught:
        settings_from({"batchsize": 4, "max_tokns": 3, "top_p": 2}, required=("env", "model"))
    assert len(caught.value.problems) == 5
    assert "unknown option 'batchsize'" in str(caught.value)
    assert "Did you mean 'max_tokens'?" in str(caught.value)
    assert "no model was given" in str(caught.value)


def test_environment_options_are_merged_one_by_one_for_the_same_environment_only():
    first = {"env": "a", "env_options": {"level": 1, "size": 5}}
    assert merge(first, {"env_options": {"level": 2}})["env_options"] == {"level": 2, "size": 5}
    assert merge(first, {"env": "a", "env_options": {"level": 2}})["env_options"] == {"level": 2, "size": 5}
    assert merge(first, {"env": "b"})["env_options"] == {}
    assert merge(first, {"env": "b", "env_options": {"x": 1}})["env_options"] == {"x": 1}


def test_a_run_that_is_named_later_gets_a_folder_of_its_own():
    first = {"run_name": "first", "output_dir": "outputs/first"}
    assert "output_dir" not in merge(first, {"run_name": "again"})
    assert merge(first, {"run_name": "again", "output_dir": "new"})["output_dir"] == "new"
    assert merge(first, {"output_dir": "new"}) == {"run_name": "first", "output_dir": "new"}
    assert merge(first, {"seed": 1})["output_dir"] == "outputs/first"


@pytest.mark.parametrize(
    ("changed", "sizes"),
    [
        # 8 prompts × 8 completions; 2 groups of 2,048 + 8 × 1,024 tokens are fewer than 8 rows of 3,072
        ({"batch_size": 4}, (4, 16, 8)),
        ({"prompts_per_step": 2}, (16, 1, 2)),
        ({"gradient_accumulation_steps": 2}, (16, 2, 4)),
        ({"num_generations": 4}, (16, 2, 8)),
        ({"seed": 1}, (16, 4, 8)),
    ],
)
def test_one_size_of_a_resolved_configuration_can_be_changed(changed, sizes):
    settings = settings_from(TrainSettings().resolved().planned().as_dict(), changed).resolved().planned()
    assert (settings.batch_size, settings.gradient_accumulation_steps, settings.prompts_per_step) == sizes


def test_sizes_that_a_user_has_written_stay():
    settings = (
        settings_from({"batch_size": 8, "gradient_accumulation_steps": 4}, {"batch_size": 16}).resolved().planned()
    )
    assert (settings.batch_size, settings.gradient_accumulation_steps, settings.prompts_per_step) == (16, 4, 8)


def test_a_dumped_configuration_reads_back_the_same(tmp_path):
    settings = TrainSettings(env="arithmetic", model="m", env_options={"levels": "1"}, learning_rate=3e-6).resolved()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.as_dict()))
    assert settings_from(read_config(path)) == settings


@pytest.mark.parametrize(
    ("content", "says"),
    [("- a\n- b\n", "is not a mapping"), ("a: [", "is not valid YAML"), ("1: 2\n", "is not a mapping")],
)
def test_configuration_files_that_cannot_be_read(tmp_path, content, says):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_config(path)


def test_an_empty_configuration_file_has_no_options(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert read_config(tmp_path / "run.yaml") == {}
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "missing.yaml")


def test_the_number_of_processes_counts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert TrainSettings().planned().gradient_accumulation_steps == 2
