"""`rlvr.export`: what it writes is the trained policy, and what is not is found and leaves nothing behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from faulty_tokenizers import SavesOtherEnd, SavesOtherTemplate
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from short_runs import SMALL, environment
from transformers import AutoModelForCausalLM

import rlvr
from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.hf.merge import merged_state_dict, with_weights
from rlvr.errors import ConfigError, ExportError, RunFolderError, UnsupportedSettingError
from rlvr.tracking.run_folder import RunFolder

BACKENDS = [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]
IDS = torch.arange(3, 43).reshape(1, 40)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.float()


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_is_exported_and_loads_without_rlvr(trained, backend, lively_model):
    run = trained(backend)
    made = rlvr.export(run)
    assert made.folder == run / "exports" / "adapter"
    assert made.parity.error < 1e-6
    assert made.parity.kept == pytest.approx(1)
    assert made.parity.trained > 0.01
    assert made.adapter == RunFolder(run).summary()["adapter"]
    by_peft = AutoPeftModelForCausalLM.from_pretrained(made.folder)
    before = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    torch.testing.assert_close(logits(by_peft), logits(before))
    base = AutoModelForCausalLM.from_pretrained(lively_model)
    assert (logits(base) - logits(before)).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merged_model_is_exported_and_loads_without_rlvr(trained, backend):
    run = trained(backend)
    made = rlvr.export(str(run), "merged-16bit", output=run / "merged")
    assert made.folder == run / "merged"
    assert 0 < made.parity.error < 0.05 < made.parity.trained
    merged = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    policy = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    assert (logits(merged) - logits(policy)).abs().mean() < 0.05 * logits(policy).abs().mean()
    report = json.loads((made.folder / "parity.json").read_text())
    assert report["ok"]
    assert report["error"] == made.parity.error
    assert report["adapter"] == made.adapter


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fully_trained_model_is_exported(trained, backend):
    run = trained(backend, full=True)
    with pytest.raises(ConfigError, match="trained every weight and has no adapter; use --format merged-16bit"):
        rlvr.export(run)
    made = rlvr.export(run, "merged-16bit")
    assert made.parity.kept == pytest.approx(1, abs=0.1)
    assert made.adapter == RunFolder(run).summary()["adapter"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints_of_a_resumed_run_are_exported_each_as_it_was(trained, backend):
    run = trained(backend)
    rlvr.train(environment(), resume_from_checkpoint="last", output_dir=run, max_steps=4, learning_rate=5e-3)
    made = {step: rlvr.export(run, checkpoint=step) for step in (1, 2, "last")}
    end = rlvr.export(run)
    assert made["last"].folder == run / "exports" / "adapter-checkpoint-4"
    assert made["last"].adapter == end.adapter == RunFolder(run).summary()["adapter"]
    weights = {step: (export.folder / "adapter_model.safetensors").read_bytes() for step, export in made.items()}
    assert len(set(weights.values())) == 3
    assert weights["last"] == (end.folder / "adapter_model.safetensors").read_bytes()
    assert [row["source"] for row in RunFolder(run).exports()] == [
        *("checkpoint-1", "checkpoint-2", "checkpoint-4", "adapter")
    ]


@pytest.mark.both
def test_an_unfinished_run_has_checkpoints_to_export(trained):
    run = trained()
    (run / "summary.json").unlink()
    with pytest.raises(RunFolderError, match=r"has not finished.*it has: 1, 2"):
        rlvr.export(run)
    assert rlvr.export(run, checkpoint="last").folder.name == "adapter-checkpoint-2"


# Faults


class ExportsTheBase(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        super().save(super().load_policy(policy.settings), folder, export_format)


class DropsAlpha(HFBackend):
    """Says half the alpha in what it saves."""

    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        path = Path(folder) / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] // 2}))


class LoadsAFreshAdapter(HFBackend):
    def load_saved(self, folder, settings, *, trainable=False):
        if Path(folder).name != "adapter":
            return super().load_saved(folder, settings, trainable=trainable)
        return self.apply_lora(super().load_policy(settings), super().load_saved(folder, settings).lora)


class WritesAnotherTokenizer(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        path = Path(folder) / "tokenizer.json"
        path.write_text(path.read_text().replace('"a":', '"~":').replace('"e":', '"a":').replace('"~":', '"e":'))


class WritesFloat32(HFBackend):
    def _merged(self, policy):
        return with_weights(policy.model.get_base_model(), merged_state_dict(policy.model), torch.float32)


class NamesAnotherBase(HFBackend):
    name_and_value = ("base_model_name_or_path", "nobody/not-the-base")

    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        path = Path(folder) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **dict([self.name_and_value])}))


class NamesAnotherRevision(NamesAnotherBase):
    name_and_value = ("revision", "v2")


class WritesNoTokenizer(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        for path in Path(folder).glob("*token*"):
            path.unlink()


class FailsMidway(HFBackend):
    error: Exception = OSError(28, "No space left on device")

    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        raise self.error


class DiskIsFull(FailsMidway):
    """As safetensors says it, whose error is no OSError."""

    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


class IsInterrupted(FailsMidway):
    error = KeyboardInterrupt()


@pytest.mark.both
@pytest.mark.parametrize(
    ("backend", "export_format", "raises", "says"),
    [
        (ExportsTheBase(), "merged-16bit", ExportError, r"shows -?\d% of what was trained.*: it is the base"),
        (DropsAlpha(), "adapter", ExportError, r"shows (4|5)\d% of what was trained \(allowed: 95%"),
        (LoadsAFreshAdapter(), "merged-16bit", ExportError, "is not the one that was trained: its weights have the"),
        (WritesAnotherTokenizer(), "merged-16bit", ExportError, "tokenizer reads the same texts as other tokens"),
        (WritesFloat32(), "merged-16bit", ExportError, "holds weights in F32, not in 16 bits"),
        (
            NamesAnotherBase(),
            "adapter",
            ExportError,
            "names the base 'nobody/not-the-base', and the run was trained on",
        ),
        (NamesAnotherRevision(), "adapter", ExportError, "names the revision 'v2' of its base, and the run.*on None"),
        (WritesNoTokenizer(), "adapter", ExportError, "holds no tokenizer that transformers can load"),
        (SavesOtherTemplate(), "merged-16bit", ExportError, "chat template is another than the trained policy's"),
        (SavesOtherTemplate(), "adapter", ExportError, "chat template is another than the trained policy's"),
        (SavesOtherEnd(), "merged-16bit", ExportError, r"ends a turn with '<\|endoftext\|>', and the trained"),
        (FailsMidway(), "merged-16bit", ExportError, "the export cannot be written: .*No space left"),
        (DiskIsFull(), "merged-16bit", ExportError, "the export cannot be written: .*No space left"),
        (IsInterrupted(), "adapter", KeyboardInterrupt, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, HFBackend) else "",
)
def test_a_faulty_export_is_an_error_and_leaves_nothing(trained, backend, export_format, raises, says):
    run = trained()
    before = files(run)
    with pytest.raises(raises, match=says):
        rlvr.export(run, export_format, backend=backend)
    assert files(run) == before
    assert not (run / "exports").exists()


class RoundsTheBase(HFBackend):
    """Stands in for quantization: each row of a weight to so many levels on either side of zero."""

    levels = 1

    def capabilities(self):
        return replace(super().capabilities(), quantizations=frozenset({"none", "4bit"}))

    def load_policy(self, settings):
        policy = super().load_policy(replace(settings, quantization="none"))
        if settings.quantization == "4bit":
            with torch.no_grad():
                for layer in policy.model.modules():
                    if isinstance(layer, torch.nn.Linear):
                        step = layer.weight.abs().amax(1, keepdim=True) / self.levels
                        layer.weight.copy_((layer.weight / step).round() * step)
        return replace(policy, settings=settings)


@pytest.fixture
def trained_in_4_bits(lively_model, tmp_path):
    """`trained_in_4_bits(backend)` → a run of two steps on what a backend takes for 4 bits."""

    def train(backend):
        folder = tmp_path / "run"
        return rlvr.train(
            environment(), lively_model, backend, **SMALL, max_steps=2, load_in_4bit=True, output_dir=folder
        )

    return train


@pytest.mark.both
def test_quantization_that_a_merged_export_cannot_follow_leaves_the_adapter(trained_in_4_bits):
    backend = RoundsTheBase()
    run = trained_in_4_bits(backend)
    with pytest.raises(ExportError, match=r"trained on weights in 4bit.* --format adapter keeps .*--load-in-4bit"):
        rlvr.export(run, "merged-16bit", backend=backend)
    assert rlvr.export(run, backend=backend).parity.kept == pytest.approx(1)


class DoesNotClaimIt(RoundsTheBase):
    def capabilities(self):
        return HFBackend().capabilities()


@pytest.mark.both
def test_an_export_by_a_backend_that_does_not_claim_the_quantization_of_the_run_is_refused(trained_in_4_bits):
    run = trained_in_4_bits(RoundsTheBase())
    with pytest.raises(UnsupportedSettingError, match="cannot honour quantization='4bit'"):
        rlvr.export(run, backend=DoesNotClaimIt())
    assert not (run.folder / "exports").exists()


class RoundsTheBaseALittle(RoundsTheBase):
    levels = 127


class MergesHalf(RoundsTheBaseALittle):
    def save(self, policy, folder, export_format="adapter"):
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                parameter.mul_(0.5 if export_format == "merged-16bit" and "lora_B" in name else 1)
        super().save(policy, folder, export_format)


@pytest.mark.both
def test_half_of_alpha_is_found_in_what_was_trained_on_quantized_weights(trained_in_4_bits):
    backend = RoundsTheBaseALittle()
    run = trained_in_4_bits(backend)
    with pytest.raises(ExportError, match=r"it shows [45]\d% of what was trained \(allowed: 60% to 140%\)"):
        rlvr.export(run, "merged-16bit", backend=MergesHalf())
    assert rlvr.export(run, "merged-16bit", backend=backend).parity.kept == pytest.approx(1, abs=0.2)


@pytest.mark.both
def test_an_export_of_changed_files_is_refused(trained):
    run = trained()
    shutil.copy(
        run / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors",
        run / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(RunFolderError, match=r"no longer those that the run saved: adapter_model\.safetensors"):
        rlvr.export(run)


@pytest.mark.both
@pytest.mark.parametrize("record", ["without a record", "with its record"])
def test_weights_that_were_exchanged_are_not_what_the_run_says_that_it_trained(trained, record):
    run = trained()
    names = ["adapter_model.safetensors", *(["lineage.json"] if record == "with its record" else [])]
    (run / "adapter" / "lineage.json").unlink()
    for name in names:
        shutil.copy(run / "checkpoints" / "checkpoint-1" / name, run / "adapter" / name)
    if record == "with its record":  # of which the other files are those of the adapter
        path = run / "adapter" / "lineage.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))
    with pytest.raises((ExportError, RunFolderError), match=r"is not the one that was trained|saved: lineage\.json"):
        rlvr.export(run)
    assert not (run / "exports").exists()


@pytest.mark.both
def test_a_run_whose_records_are_damaged_is_not_exported(trained):
    run = trained()
    (run / "adapter" / "lineage.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"no longer those that the run saved: lineage\.json"):
        rlvr.export(run)
    for damage in ("garbage", "{}"):
        (run / "summary.json").write_text(damage)
        with pytest.raises(RunFolderError, match=r"summary\.json' (cannot be read|is damaged)"):
            rlvr.export(run)


@pytest.mark.both
def test_nothing_is_written_over_and_others_files_beside_it_stay(trained, tmp_path):
    run = trained()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(RunFolderError, match="exists, and nothing is written over"):
        rlvr.export(run, output=tmp_path / "mine")
    with pytest.raises(ExportError):
        rlvr.export(run, output=tmp_path / "mine" / "deep" / "adapter", backend=DropsAlpha())
    assert files(tmp_path / "mine") == {Path("notes.txt"): b"precious"}
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


# The model card


@pytest.mark.both
def test_the_model_card_says_what_was_trained_and_no_secret(trained, lively_model):
    run = trained()
    path = run / "config.yaml"
    secret = {"api_key": "hush", "data": "/home/me/private/rows.jsonl", "levels": "2", "url": "http://u:hunter2@h"}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "env_options": secret}))
    folder = rlvr.export(run, "merged-16bit").folder
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert {"rlvr", "grpo", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder of this machine is nothing to the Hub
    assert card.data.license is None
    summary = RunFolder(run).summary()
    for words in (
        *("environment `bytes`", "for 2 optimizer steps", "backend `hf`", "levels: '2'", "rows.jsonl"),
        *("learning_rate: 0.005", "r: 16", "## Evaluation", summary["adapter"], "- trl ", "- peft ", "- rlvr "),
        f"| reward | {summary['eval_before']['reward']:.3f} | {summary['eval_after']['reward']:.3f} |",
    ):
        assert words in card.text
    for words in ("hush", "hunter2", "/home/me", str(lively_model.parent), str(run)):
        assert words not in card.content


@pytest.mark.both
def test_the_code_of_the_card_loads_the_export(trained, lively_model):
    run = trained()
    for export_format, library in (("adapter", "peft"), ("merged-16bit", "transformers")):
        folder = rlvr.export(run, export_format).folder
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == library
        code = card.text.split("```python\n")[1].split("```")[0]
        found = {}
        exec(
            code.replace("PATH_OR_REPOSITORY", str(folder)).replace(
                f'"{lively_model.name}"', f"{str(lively_model)!r}"
            ),
            found,
        )
        assert logits(found["model"]).shape == (1, 40, 259)
        assert found["tokenizer"].eos_token == "<|im_end|>"


# The Hub


@pytest.mark.both
def test_it_is_pushed_on_request_only_and_after_the_comparison(trained, hub):
    run = trained()
    assert rlvr.export(run).url is None
    with pytest.raises(ExportError):
        rlvr.export(run, output=run / "bad", backend=DropsAlpha(), push_to_hub="me/it")
    assert hub == []
    made = rlvr.export(run, "merged-16bit", push_to_hub="me/it", private=True)
    assert made.url == "https://huggingface.co/me/it"
    (created, uploaded) = hub
    assert created == ("create", "me/it", {"private": True, "exist_ok": True})
    assert uploaded[:2] == ("upload", "me/it")
    assert {"README.md", "parity.json", "lineage.json", "model.safetensors", "tokenizer.json"} <= set(uploaded[2])


@pytest.mark.both
def test_what_could_not_be_pushed_is_complete_and_the_way_to_push_it_is_said(trained, hub, monkeypatch):
    import huggingface_hub

    def refuse(*args, **options):
        raise ConnectionError("the Hub is away")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    run = trained()
    folder = run / "exports" / "adapter"
    with pytest.raises(ExportError, match=rf"{folder}' is complete, .*Hub is away.*'hf upload me/it {folder} \. --p"):
        rlvr.export(run, push_to_hub="me/it", private=True)
    assert (folder / "lineage.json").is_file()
    assert [row["format"] for row in RunFolder(run).exports()] == ["adapter"]


@pytest.mark.both
@pytest.mark.parametrize("full", [False, True])
def test_the_runs_own_folder_has_our_card(trained, full):
    folder = RunFolder(trained(full=full)).trained()
    card = ModelCard.load(folder / "README.md")
    assert "environment `bytes`" in card.text
    assert "More Information Needed" not in card.text


@pytest.mark.both
def test_versions_on_the_card_include_those_of_plugins(trained):
    run = trained()
    path = run / "versions.json"
    versions = json.loads(path.read_text())
    versions["packages"]["their-backend"] = "0.7"
    path.write_text(json.dumps(versions))
    assert "- their-backend 0.7" in (rlvr.export(run).folder / "README.md").read_text()
