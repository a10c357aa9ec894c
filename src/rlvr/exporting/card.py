"""The model card: what was trained, on what, by which versions, and how an export compares with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import ExportFormat
from rlvr.config import MEMORY, ROLLOUTS, TRAINING, TrainSettings
from rlvr.exporting.parity import Parity
from rlvr.exporting.source import Source, find_source
from rlvr.exporting.writers import GGUF_FILE
from rlvr.secrets import without_secrets
from rlvr.tracking.run_folder import PACKAGES, RunFolder
from rlvr.wording import counted

_PACKAGES = ("rlvr", "torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes")
_SETTINGS = (ROLLOUTS, TRAINING, MEMORY)  # groups of `TrainSettings`; LoRA is stated as the backend applied it

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(base, "{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")
"""
_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{here}")
"""
_LOAD_GGUF = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}", gguf_file="{file}")  # or: llama-cli -m {file}
tokenizer = AutoTokenizer.from_pretrained("{here}", gguf_file="{file}")
"""
_HERE = "PATH_OR_REPOSITORY"


def model_card(source: Source, export_format: ExportFormat, parity: Parity | None) -> str:
    """A README.md with front matter as the Hub reads it. It holds no secret, and no path of this machine.

    Args:
        parity: how the export compares; None where the run's own files are described.
    """
    config = without_secrets(source.config)
    base, env = _portable(source.settings.model), str(config["env"])
    kind = "LoRA adapter" if source.is_adapter else "fully fine-tuned model"
    merged = ", merged into its base," if source.is_adapter and export_format != "adapter" else ""
    sections = [
        f"---\n{_front_matter(source, export_format)}\n---",
        f"# {Path(base).name}, trained on {env}",
        f"A {kind} of `{base}`{merged} trained with reinforcement learning from verifiable rewards (GRPO) on the "
        f"environment `{env}`, for {counted(source.step, 'optimizer step')}, with rlvr's backend "
        f"`{config['backend']}`.",
        f"## Load\n\n```python\n{_loading(source, export_format, base)}```",
        f"## Environment\n\n{_yaml({'env': env, 'env_options': _portable(config['env_options'])})}",
        f"## Evaluation\n\n{_evaluation(source)}",
        *([f"## Comparison with the trained policy\n\n{_comparison(export_format, parity)}"] if parity else []),
        f"## Settings\n\n{_yaml({**_settings(config), 'lora': source.run.policy()['lora']})}",
        f"## Versions\n\n{_versions(source.run.versions())}",
        f"## Lineage\n\n{_lineage(source, base)}",
    ]
    return "\n\n".join(sections) + "\n"


def write_own_card(run: RunFolder) -> None:
    """Puts the card of a finished run beside its weights, in place of PEFT's empty one."""
    source = find_source(run.path)
    card = model_card(source, "adapter" if source.is_adapter else "merged-16bit", parity=None)
    (source.folder / "README.md").write_text(card, encoding="utf-8")


def _front_matter(source: Source, export_format: ExportFormat) -> str:
    from huggingface_hub import ModelCardData

    is_local = Path(source.settings.model).expanduser().exists()
    tags = ["rlvr", "grpo", "reinforcement-learning", *(["lora"] if source.is_adapter else [])]
    return ModelCardData(
        base_model=None if is_local else source.settings.model,
        library_name="peft" if export_format == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[*tags, *(["gguf"] if export_format == "gguf" else [])],
    ).to_yaml()


def _loading(source: Source, export_format: ExportFormat, base: str) -> str:
    code = {"adapter": _LOAD_ADAPTER, "gguf": _LOAD_GGUF}.get(export_format, _LOAD_MODEL)
    revision = f', revision="{source.settings.revision}"' if source.settings.revision else ""
    return code.format(base=base, revision=revision, here=_HERE, file=GGUF_FILE)


def _evaluation(source: Source) -> str:
    """Of the policy before the first step, and of the one that is exported."""
    by_step = {row["step"]: row["evaluation"] for row in source.run.metrics() if "evaluation" in row}
    before, after = by_step.get(0, {}), by_step.get(source.step, {})
    if not before and not after:
        return "None was made."
    names = dict.fromkeys([*before, *after])
    rows = [f"| {name} | {_number(before.get(name))} | {_number(after.get(name))} |" for name in names]
    samples = source.config["eval_samples"]
    head = f"Greedy, on at most {samples} held-out examples.\n\n| metric | before | after |\n|---|---|---|\n"
    return head + "\n".join(rows)


def _comparison(export_format: ExportFormat, parity: Parity) -> str:
    kept = "" if parity.kept is None else f"; {parity.kept:.0%} of what was trained shows (± {parity.kept_error:.1%})"
    doubt = f"\n\nNote: {parity.doubt}." if parity.doubt else ""
    return (
        f"This `{export_format}` export was loaded back. On {parity.tokens} tokens its log-probabilities differ from "
        f"the trained policy's by {parity.error:.2g} nats on average (allowed: {parity.allowed:g}), the base model's "
        f"by {parity.trained:.2g}{kept}. {parity.same_greedy} of {parity.greedy_tokens} greedy tokens are the same. "
        f"`parity.json` has the figures.{doubt}"
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    names = [definition.name for definition in fields(TrainSettings) if definition.metadata["group"] in _SETTINGS]
    return {name: config[name] for name in names if config.get(name) is not None}


def _versions(versions: Mapping[str, Any]) -> str:
    packages = versions["packages"]
    names = [*_PACKAGES, *(name for name in packages if name not in PACKAGES)]  # the latter: of plugins
    found = [("Python", versions["python"]), *((name, packages[name]) for name in names if name in packages)]
    devices = ", ".join(versions["devices"])
    return "\n".join([*(f"- {name} {version}" for name, version in found), f"- trained on: {devices}"])


def _lineage(source: Source, base: str) -> str:
    revision = source.settings.revision
    lines = [
        f"- base model: `{base}`" + (f", revision `{revision}`" if revision else ""),
        f"- weights: `{source.adapter or 'not recorded'}`, after {counted(source.step, 'step')} (`{source.name}` of "
        "the run)",
        f"- run: `{source.config['run_name']}`, seed {source.config['seed']}",
    ]
    return "\n".join(lines)


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return f"```yaml\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}```"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _portable(value: Any) -> Any:
    """Paths of this machine become names."""
    if isinstance(value, Mapping):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(item) for item in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return Path(value).name
    return value
