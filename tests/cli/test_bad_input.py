"""Bad input: one message with what is wrong and how to mend it, exit code 2, no traceback, nothing written over."""

import json
import shutil
from pathlib import Path

import pytest

ONE_STEP = "--max-prompt-length 64 --max-tokens 8 --max-steps 1 --eval-samples 0"  # should one not be refused
TRAIN = f"train arithmetic -m {{model}} {ONE_STEP}"
BROKEN = f"train arithmetic -m ./broken {ONE_STEP}"
URL = "http://127.0.0.1:9/v1"  # the port of the discard service: nobody listens
API = "evaluate arithmetic -m {model} --api-base-url"
MUSIQUE = "musique --datasets sample --retriever lexical -m {model}"
DATASET = f"train dataset -m {{model}} {ONE_STEP} --datasets"


def file(name, text):
    def make(model):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)

    return make


def rows(*objects):
    return file("rows.jsonl", "".join(json.dumps(item) + "\n" for item in objects))


def changed_model(change):
    """A copy of the tiny model in `broken/`, with `change` applied to its folder."""

    def make(model):
        shutil.copytree(model, "broken")
        change(Path("broken"))

    return make


def without(name):
    return changed_model(lambda folder: (folder / name).unlink())


def tokenizer_without(key):
    def change(folder):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config[key] = None
        path.write_text(json.dumps(config))
        if key == "chat_template":
            (folder / "chat_template.jinja").unlink()

    return changed_model(change)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def finished_run(model):
    file("outputs/done/config.yaml", "env: arithmetic\n")(model)
    file("outputs/done/summary.json", "{}")(model)
    file("outputs/done/checkpoints/checkpoint-5/trainer_state.json", "{}")(model)


def trained_run(**policy):
    """A run as far as an export looks at it before it loads anything."""

    def make(model):
        settings = {"model": str(model), **policy}
        kind = "model/config.json" if policy.get("full_finetuning") else "adapter/adapter_config.json"
        file("run/config.yaml", "env: arithmetic\nbackend: hf\n")(model)
        file("run/policy.json", json.dumps({"model": settings, "lora": None}))(model)
        file("run/summary.json", '{"steps": 5}')(model)
        file(f"run/{kind}", "{}")(model)
        file("run/checkpoints/checkpoint-5/trainer_state.json", "{}")(model)

    return make


def changed_run(model):
    trained_run()(model)
    file("run/adapter/lineage.json", '{"adapter": "0", "step": 5, "files": {"adapter_config.json": "1"}}')(model)


def other_files(model):
    file("mine/notes.txt", "precious")(model)


QUESTIONS = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(9)]
PLAIN = None

CASES = [
    # which plugins
    (
        "unknown-backend",
        f"{TRAIN} --backend unslot",
        PLAIN,
        ["unknown backend 'unslot'", "hf", "Did you mean 'unsloth'"],
    ),
    ("unknown-environment", "train arithmetik -m {model}", PLAIN, ["unknown environment 'arithmetik'", "arithmetic"]),
    ("environment-unknown-to-listing", "environments nope", PLAIN, ["unknown environment 'nope'", "installed"]),
    ("no-model", "train arithmetic", PLAIN, ["no model was given", "--model"]),
    ("no-environment", "train -m {model}", PLAIN, ["no environment was given", "rlvr environments"]),
    # options
    (
        "unknown-option",
        f"{TRAIN} --batchsize 8",
        PLAIN,
        ["unknown option --batchsize", "Did you mean '--batch-size'?"],
    ),
    ("unknown-option-first", "train --nois 1 -m {model}", PLAIN, ["unknown option --nois"]),
    ("unknown-environment-option", f"{TRAIN} --level 2", PLAIN, ["unknown option --level", "'--levels'"]),
    ("environment-option-type", f"{TRAIN} --train-size many", PLAIN, ["--train-size is 'many'", "whole number"]),
    ("environment-option-value", f"{TRAIN} --levels 9", PLAIN, ["9"]),
    ("environment-option-without-value", f"{TRAIN} --levels", PLAIN, ["--levels needs a value"]),
    ("unexpected-argument", f"{TRAIN} more", PLAIN, ["unexpected argument 'more'"]),
    ("text-for-a-number", f"{TRAIN} --max-steps ten", PLAIN, ["--max-steps is 'ten'", "whole number"]),
    # configuration files
    ("no-config-file", f"{TRAIN} --config run.yaml", PLAIN, ["'run.yaml'", "No such file"]),
    ("broken-yaml", f"{TRAIN} --config run.yaml", file("run.yaml", "a: ["), ["'run.yaml' is not valid YAML"]),
    ("yaml-list", f"{TRAIN} --config run.yaml", file("run.yaml", "- a"), ["is not a mapping of options"]),
    (
        "unknown-option-in-yaml",
        f"{TRAIN} --config run.yaml",
        file("run.yaml", "num_generation: 4"),
        ["unknown option 'num_generation'", "Did you mean 'num_generations'?"],
    ),
    (
        "yaml-type",
        f"{TRAIN} --config run.yaml",
        file("run.yaml", "batch_size: eight"),
        ["batch_size is 'eight'", "whole number"],
    ),
    (
        "several-problems",
        f"{TRAIN} --config run.yaml --max-tokens 0",
        file("run.yaml", "top_p: 2\nseeds: 1"),
        ["3 settings cannot be used", "max_tokens is 0", "top_p is 2.0", "unknown option 'seeds'"],
    ),
    # values
    ("one-generation", f"{TRAIN} --num-generations 1", PLAIN, ["num_generations is 1", "two or more"]),
    ("no-tokens", "train arithmetic -m {model} --max-tokens 0", PLAIN, ["max_tokens is 0", "at least 1"]),
    ("negative-rate", f"{TRAIN} --learning-rate -1e-5", PLAIN, ["learning_rate is -1e-05", "above 0"]),
    ("zero-rate", f"{TRAIN} --learning-rate 0", PLAIN, ["learning_rate is 0.0", "above 0"]),
    ("no-prompt", "train arithmetic -m {model} --max-prompt-length 0", PLAIN, ["max_prompt_length is 0"]),
    ("temperature", f"{TRAIN} --temperature 0", PLAIN, ["temperature is 0.0", "above 0"]),
    ("top-p", f"{TRAIN} --top-p 1.5", PLAIN, ["top_p is 1.5", "at most 1"]),
    ("top-k", f"{TRAIN} --top-k -1", PLAIN, ["top_k is -1", "at least 0"]),
    ("min-p", f"{TRAIN} --min-p 2", PLAIN, ["min_p is 2.0", "at most 1"]),
    ("kl-beta", f"{TRAIN} --kl-beta -0.1", PLAIN, ["kl_beta is -0.1"]),
    ("no-steps", f"{TRAIN} --max-steps 0", PLAIN, ["max_steps is 0", "at least 1"]),
    ("nan-epochs", f"{TRAIN} --num-epochs nan", PLAIN, ["num_epochs is nan", "above 0"]),
    ("memory-share", f"{TRAIN} --gpu-memory-utilization 1.5", PLAIN, ["gpu_memory_utilization is 1.5", "at most 1"]),
    ("loss-type", f"{TRAIN} --loss-type gspo", PLAIN, ["loss_type is 'gspo'", "dr_grpo"]),
    ("scale-rewards", f"{TRAIN} --scale-rewards yes", PLAIN, ["scale_rewards is 'yes'", "group, batch, none"]),
    ("rollout-engine", f"{TRAIN} --rollout-engine vlm", PLAIN, ["rollout_engine is 'vlm'", "Did you mean 'vllm'?"]),
    (
        "parser",
        f"{TRAIN} --tool-call-parser hermez --bf16 --fp16",
        PLAIN,
        ["2 settings", "tool_call_parser is 'hermez'", "llama3_json", "my_module:my_parser", "Did you mean 'hermes'?"],
    ),
    ("no-parser", f"{TRAIN} --tool-call-parser=", PLAIN, ["tool_call_parser is ''", "hermes"]),
    ("parser-without-tools", f"{TRAIN} --tool-call-parser hermes", PLAIN, ["has no tools", "Leave it out"]),
    (
        "parser-module",
        f"train {MUSIQUE} {ONE_STEP} --tool-call-parser nowhere:parser",
        PLAIN,
        ["tool-call parser 'nowhere:parser' cannot be loaded", "No module named 'nowhere'"],
    ),
    ("tracker", f"{TRAIN} --report-to wandbb", PLAIN, ["report_to is 'wandbb'", "wandb"]),
    # contradictions
    ("bf16-and-fp16", f"{TRAIN} --bf16 --fp16", PLAIN, ["bf16 and fp16 are both on"]),
    ("bf16-and-float32", f"{TRAIN} --bf16 --dtype float32", PLAIN, ["bf16 is on and dtype is 'float32'"]),
    ("4bit-and-8bit", f"{TRAIN} --load-in-4bit --load-in-8bit", PLAIN, ["choose one"]),
    ("full-4bit", f"{TRAIN} --no-peft --load-in-4bit", PLAIN, ["quantized weights cannot be trained", "--peft"]),
    (
        "batch-cuts-groups",
        f"{TRAIN} --batch-size 3 --gradient-accumulation-steps 1",
        PLAIN,
        ["3 completions a step", "num_generations 8 does not divide"],
    ),
    (
        "prompts-and-batch",
        f"{TRAIN} --prompts-per-step 3 --batch-size 16",
        PLAIN,
        ["24 completions", "--batch-size 12"],
    ),
    (
        "three-sizes",
        f"{TRAIN} --prompts-per-step 2 --batch-size 8 --gradient-accumulation-steps 3",
        PLAIN,
        ["Leave one of the three out"],
    ),
    # LoRA
    ("lora-rank", f"{TRAIN} --lora-r 0", PLAIN, ["lora_r is 0", "at least 1"]),
    ("lora-dropout", f"{TRAIN} --lora-dropout 1", PLAIN, ["lora_dropout is 1.0", "below 1"]),
    ("no-lora-modules", f"{TRAIN} --lora-target-modules ,", PLAIN, ["target_modules is empty", "all-linear"]),
    ("unknown-lora-modules", f"{TRAIN} --lora-target-modules query", PLAIN, ["query", "q_proj"]),
    # what this machine lacks
    ("4bit-on-cpu", f"{TRAIN} --load-in-4bit", PLAIN, ["cannot honour quantization='4bit'", "rlvr[quantization]"]),
    ("flash-on-cpu", f"{TRAIN} --attention flash_attention_2", PLAIN, ["cannot honour attention='flash_attention_2'"]),
    ("fast-inference", f"{TRAIN} --fast-inference on", PLAIN, ["cannot honour fast_inference='on'"]),
    ("push-without-token", f"{TRAIN} --push-to-hub", PLAIN, ["no Hugging Face token", "hf auth login"]),
    # output folders
    ("another-run", f"{TRAIN} --output-dir outputs/done", finished_run, ["holds another run", "--output-dir"]),
    ("another-run-by-name", f"{TRAIN} --run-name done", finished_run, ["holds another run", "--run-name"]),
    ("other-files", f"{TRAIN} --output-dir mine", other_files, ["holds other files (notes.txt)"]),
    ("not-a-folder", f"{TRAIN} --output-dir mine/notes.txt/run", other_files, ["cannot be written to"]),
    ("resume-nothing", f"{TRAIN} --output-dir new --resume-from-checkpoint last", PLAIN, ["nothing to resume from"]),
    ("resume-no-folder", f"{TRAIN} --resume-from-checkpoint last", PLAIN, ["needs --output-dir or --run-name"]),
    ("resume-no-checkpoint", f"{TRAIN} --resume-from-checkpoint nowhere", PLAIN, ["no checkpoint in 'nowhere'"]),
    (
        "resume-elsewhere",
        f"{TRAIN} --output-dir new --resume-from-checkpoint outputs/done/checkpoints/checkpoint-5",
        finished_run,
        ["belongs to the run in", "Leave --output-dir out"],
    ),
    # models and tokenizers
    ("no-model-folder", "train arithmetic -m ./nowhere", PLAIN, ["'./nowhere' does not exist"]),
    ("model-is-a-file", "train arithmetic -m ./mine/notes.txt", other_files, ["is a file"]),
    ("no-weights", BROKEN, without("model.safetensors"), ["has no weights", "save_pretrained"]),
    ("no-configuration", BROKEN, without("config.json"), ["has no config.json"]),
    ("cut-weights", BROKEN, changed_model(cut_weights), ["model.safetensors", "damaged"]),
    ("no-tokenizer", BROKEN, without("tokenizer.json"), ["tokenizer"]),
    ("no-eos", BROKEN, tokenizer_without("eos_token"), ["no eos token"]),
    ("no-template", BROKEN, tokenizer_without("chat_template"), ["no chat template"]),
    ("too-long", "train arithmetic -m {model} --max-tokens 100000", PLAIN, ["takes 4096 tokens at most"]),
    # data
    ("no-dataset", "train dataset -m {model}", PLAIN, ["datasets"]),
    ("no-dataset-file", f"{DATASET} rows.jsonl", PLAIN, ["rows.jsonl"]),
    ("empty-dataset", f"{DATASET} rows.jsonl", file("rows.jsonl", ""), ["rows.jsonl"]),
    ("broken-rows", f"{DATASET} rows.jsonl", file("rows.jsonl", '{"question": '), ["rows.jsonl"]),
    (
        "unknown-suffix",
        f"{DATASET} rows.txt",
        file("rows.txt", "1+1\t2"),
        ["'rows.txt' has none of the suffixes", ".jsonl, .json, .parquet, .csv"],
    ),
    ("no-question", f"{DATASET} rows.jsonl", rows({"ask": "1+1", "answer": "2"}), ["question", "ask"]),
    ("no-answer", f"{DATASET} rows.jsonl", rows({"question": "1+1", "solution": "2"}), ["answer", "solution"]),
    ("unknown-reward", f"{DATASET} rows.jsonl --reward exact", rows(*QUESTIONS), ["exact", "exact-match"]),
    ("reward-module", f"{DATASET} rows.jsonl --reward nowhere:f", rows(*QUESTIONS), ["nowhere"]),
    (
        "fewer-prompts-than-a-step",
        f"{DATASET} rows.jsonl --prompts-per-step 20",
        rows(*QUESTIONS),
        ["a step takes 20 different prompts", "--prompts-per-step"],
    ),
    (
        "prompts-too-long",
        "train arithmetic -m {model} --max-prompt-length 2 --max-tokens 8",
        PLAIN,
        ["longer than max_prompt_length 2", "--max-prompt-length"],
    ),
    (
        "embedding-model",
        f"train musique --datasets sample -m {{model}} {ONE_STEP} --retriever semantic/me/mini-lm",
        PLAIN,
        ["the embedding model 'me/mini-lm' cannot be loaded", "--retriever semantic/MODEL"],
    ),
    # evaluation
    ("evaluate-no-model", "evaluate arithmetic", PLAIN, ["no model was given"]),
    ("evaluate-no-attempts", "evaluate arithmetic -m {model} --samples 0", PLAIN, ["samples is 0", "at least 1"]),
    (
        "evaluate-texts-for-numbers",
        "evaluate arithmetic -m {model} --samples many --temperature hot",
        PLAIN,
        [
            "2 settings",
            "--samples is 'many'; it must be a whole number",
            "--temperature is 'hot'; it must be a number",
        ],
    ),
    (
        "evaluate-greedy-attempts",
        "evaluate arithmetic -m {model} --samples 4 --temperature 0",
        PLAIN,
        ["samples is 4 with temperature 0", "--temperature"],
    ),
    (
        "evaluate-cold",
        "evaluate arithmetic -m {model} --temperature -1",
        PLAIN,
        ["temperature is -1.0", "0 is greedy"],
    ),
    (
        "evaluate-parser",
        f"evaluate {MUSIQUE} --tool-call-parser nowhere.py:parser",
        PLAIN,
        ["tool-call parser 'nowhere.py:parser' cannot be loaded", "nowhere.py"],
    ),
    ("evaluate-no-adapter", "evaluate arithmetic -m {model} --adapter mine", other_files, ["no adapter in 'mine'"]),
    (
        "evaluate-over-a-file",
        "evaluate arithmetic -m {model} --output mine/notes.txt",
        other_files,
        ["exists, and nothing is written over"],
    ),
    (
        "evaluate-to-nowhere",
        "evaluate arithmetic -m {model} --output nowhere/attempts.jsonl",
        PLAIN,
        ["there is no folder 'nowhere' for --output"],
    ),
    (
        "evaluate-beside-settings",
        "evaluate arithmetic -m {model} --output a.jsonl",
        file("a.jsonl.settings.json", "{}"),
        ["'a.jsonl.settings.json' exists", "--resume"],
    ),
    ("evaluate-resume-nothing", "evaluate arithmetic -m {model} --resume", PLAIN, ["resume was given without output"]),
    (
        "evaluate-resume-another",
        "evaluate arithmetic -m {model} --resume --output a.jsonl --samples 2 --limit 3",
        file("a.jsonl.settings.json", '{"samples": 1, "temperature": 1.0}'),
        ["made with other settings", "samples was 1 and is 2", "another --output"],
    ),
    (
        "evaluate-resume-without-settings",
        "evaluate arithmetic -m {model} --resume --output a.jsonl --limit 3",
        file("a.jsonl", "{}\n"),
        ["cannot go on with 'a.jsonl'", "a.jsonl.settings.json"],
    ),
    ("evaluate-no-batch", "evaluate arithmetic -m {model} --batch-size 0", PLAIN, ["batch_size is 0", "at least 1"]),
    # a model behind an API
    ("api-no-model", f"evaluate arithmetic --api-base-url {URL}", PLAIN, ["no model was given"]),
    ("api-no-address", f"{API} localhost:8000/v1", PLAIN, ["'localhost:8000/v1'", "http://localhost:8000/v1"]),
    ("api-whole-address", f"{API} {URL}/chat/completions", PLAIN, ["leave /chat/completions out"]),
    ("api-password", f"{API} http://me:hidden@host/v1", PLAIN, ["holds a name, a password", "--api-key-env"]),
    ("api-no-key", f"{API} {URL} --api-key-env NOT_SET_AT_ALL", PLAIN, ["NOT_SET_AT_ALL", "not set or empty"]),
    (
        "api-and-local",
        f"{API} {URL} --backend hf --adapter mine --batch-size 2 --load-in-4bit",
        PLAIN,
        [f"{name} was given with api_base_url" for name in ("backend", "adapter", "batch_size", "load_in_4bit")],
    ),
    (
        "api-values",
        f"{API} {URL} --api-retries -1 --api-timeout 0 --concurrency 0",
        PLAIN,
        ["api_retries is -1", "api_timeout_s is 0.0", "concurrency is 0"],
    ),
    (
        "api-options-alone",
        "evaluate arithmetic -m {model} --concurrency 4 --api-retries 2",
        PLAIN,
        ["concurrency was given without api_base_url", "api_retries was given without api_base_url"],
    ),
    ("api-nobody-there", f"{API} {URL} --limit 2 --api-retries 0", PLAIN, ["all 2 attempts failed", f"{URL}/chat"]),
    # preflight
    ("preflight-no-model", "preflight arithmetic", PLAIN, ["no model was given"]),
    ("preflight-no-prompts", "preflight arithmetic -m {model} --prompts 0", PLAIN, ["prompts is 0", "at least 1"]),
    ("preflight-no-group", "preflight arithmetic -m {model} --num-generations 1", PLAIN, ["num_generations is 1"]),
    ("preflight-cold", "preflight arithmetic -m {model} --temperature 0", PLAIN, ["temperature is 0.0", "above 0"]),
    ("preflight-steps", "preflight arithmetic -m {model} --max-steps 3", PLAIN, ["unknown option --max-steps"]),
    ("preflight-vllm", "preflight arithmetic -m {model} --rollout-engine vllm", PLAIN, ["'vllm', which trains only"]),
    # export and lineage
    ("export-no-run", "export nowhere", PLAIN, ["no run in 'nowhere'", "config.yaml"]),
    (
        "export-unfinished",
        "export run",
        file("run/config.yaml", "env: arithmetic\n"),
        ["the run in 'run' has not finished", "--checkpoint", "it has: none"],
    ),
    (
        "export-format",
        "export run --format onnx",
        trained_run(),
        ["format is 'onnx'", "adapter, merged-16bit, merged-4bit, gguf"],
    ),
    (
        "export-over-something",
        "export run --output run/adapter",
        trained_run(),
        ["'run/adapter' exists, and nothing is written over", "--output"],
    ),
    ("export-into-a-file", "export run --output run/config.yaml/x", trained_run(), ["cannot be made", "--output"]),
    ("export-checkpoint", "export run --checkpoint 7", trained_run(), ["no checkpoint 7", "it has: 5"]),
    ("export-checkpoint-word", "export run --checkpoint newest", trained_run(), ["checkpoint is 'newest'", "'last'"]),
    (
        "export-adapter-of-all-weights",
        "export run",
        trained_run(full_finetuning=True),
        ["trained every weight and has no adapter", "merged-16bit"],
    ),
    ("export-changed", "export run", changed_run, ["no longer those that the run saved: adapter_config.json"]),
    (
        "export-4bit",
        "export run --format merged-4bit",
        trained_run(),
        ["backend 'hf' cannot export 'merged-4bit' here", "adapter, merged-16bit", "merged-4bit need a CUDA GPU"],
    ),
    (
        "export-gguf-without-converter",
        "export run --format gguf",
        trained_run(),
        ["backend 'hf' cannot export 'gguf' here", "RLVR_LLAMA_CPP", "convert_hf_to_gguf.py"],
    ),
    ("export-push-without-token", "export run --push-to-hub me/it", trained_run(), ["no Hugging Face token"]),
    (
        "export-push-nowhere",
        "export run --push-to-hub a/b/c",
        trained_run(),
        ["push_to_hub is 'a/b/c'", "me/my-model"],
    ),
    ("lineage-no-run", "lineage nowhere", PLAIN, ["no run in 'nowhere'", "config.yaml"]),
]


@pytest.mark.parametrize(("line", "prepare", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_message_and_nothing_written(command, model_folder, monkeypatch, tmp_path, line, prepare, says):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("RLVR_LLAMA_CPP", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if prepare is not None:
        prepare(model_folder)
    before = snapshot(tmp_path)
    outcome = command(*(word.format(model=model_folder) for word in line.split()))
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err + outcome.out
    assert "hidden" not in outcome.err
    for words in says:
        assert words in outcome.err, outcome.err
    assert outcome.err.count("rlvr: ") <= 1
    assert snapshot(tmp_path) == before


def test_there_are_many_and_no_two_have_one_name():
    assert len({case[0] for case in CASES}) == len(CASES) >= 40


def test_debug_shows_the_traceback_too(command):
    outcome = command("train", "arithmetik", "-m", "x", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "UnknownPluginError: unknown environment 'arithmetik'" in outcome.err


def test_the_backend_variable_is_checked_too(command, monkeypatch, model_folder):
    monkeypatch.setenv("RLVR_BACKEND", "nope")
    outcome = command("train", "arithmetic", "-m", model_folder)
    assert outcome.code == 2
    assert "unknown backend 'nope'" in outcome.err


def snapshot(folder):
    """Every file with its content; folders without files count as nothing."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
