"""Every check: its name, what it proves, and where it is written. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlvr.errors import ConfigError

GROUPS = {
    "plugin": "import order and laziness; in processes of their own, started by the checks",
    "settings": "every field of ModelSettings is honoured or refused",
    "lora": "every field of LoraSettings is honoured or refused; one adapter, where it was asked for",
    "policy": "token ids, log-probabilities, gradients and memory against a float32 reference",
    "training": "optimizer steps through EnhancedGRPOTrainer",
    "sampling": "what a training run draws from, and what it is held to",
    "saving": "what is saved loads back as the same policy",
    "engine": "an inference engine beside the model, which takes a GPU's memory for good",
    "alone": "what changes a process for good, or needs its environment set before anything is imported",
}

PROCESSES = (
    ("plugin",),
    ("settings", "lora"),
    ("policy",),
    ("training",),
    ("sampling",),
    ("saving",),
    ("alone",),
    ("engine",),
)
"""Groups that share a child process: importing torch, transformers and TRL takes ten times as long as a check. Checks
share no policy; those that would disturb others are apart, and so are the longest, which can run together."""

NEEDS_OWN_PROCESS = frozenset({"plugin", "alone"})  # left out for a backend that is given as an object


@dataclass(frozen=True)
class Check:
    """One thing that every backend has to do right. `function` is `module:name` in `conformance.checks`."""

    name: str
    group: str
    proves: str
    function: str
    argument: str | None = None  # passed to the function: which export format


CHECKS: tuple[Check, ...] = (
    Check("lazy-plugin", "plugin", "listing and importing the plugin load nothing heavy", "plugin:lazy_plugin"),
    Check("loads-first", "plugin", "loads in a fresh process, silent, nothing written", "plugin:loads_first"),
    Check("loads-late", "plugin", "after trl, transformers and peft: the same trainer, or told", "plugin:loads_late"),
    Check("capabilities", "settings", "claims are words that rlvr knows", "settings:capabilities"),
    Check(
        "setting-model", "settings", "the weights are the checkpoint's; a broken folder is refused", "settings:model"
    ),
    Check("setting-max-seq-length", "settings", "more than the model takes is refused", "settings:max_seq_length"),
    Check("setting-dtype", "settings", "weights have the dtype asked for", "settings:dtype"),
    Check("setting-quantization", "settings", "4 and 8 bits are real where claimed", "settings:quantization"),
    Check("setting-attention", "settings", "the attention implementation is the one asked for", "settings:attention"),
    Check("setting-trust-remote-code", "settings", "the model's own code runs only if asked", "settings:remote_code"),
    Check("setting-gradient-checkpointing", "settings", "on and off reach model or trainer", "settings:checkpointing"),
    Check("setting-device", "settings", "weights are on the device asked for", "settings:device"),
    Check("setting-seed", "settings", "one seed gives one policy, global random state is kept", "settings:seed"),
    Check("adapter-applied-once", "lora", "one adapter, no wrapper in a wrapper, no second one", "lora:applied_once"),
    Check("lora-r", "lora", "factors have the rank asked for", "lora:rank"),
    Check("lora-alpha", "lora", "the adapter's output is scaled as LoadedPolicy.lora says", "lora:alpha"),
    Check("lora-dropout", "lora", "dropout in training, none in inference", "lora:dropout"),
    Check("lora-target-modules", "lora", "exactly the modules asked for; unknown ones refused", "lora:targets"),
    Check("lora-bias", "lora", "exactly the biases asked for are trained", "lora:bias"),
    Check("lora-rslora", "lora", "scaled by alpha / sqrt(r)", "lora:rslora"),
    Check("lora-dora", "lora", "magnitudes are trained", "lora:dora"),
    Check("lora-init", "lora", "each start is its own and leaves the model as it was", "lora:init"),
    Check("lora-seed", "lora", "the seed decides the start, global random state is kept", "lora:seed"),
    Check("tokenizer", "policy", "ids and chat rendering are those of the model's own", "policy:tokenizer"),
    Check(
        "log-probabilities",
        "policy",
        "equal to the float32 reference, by dtype, near and far",
        "policy:log_probabilities",
    ),
    Check("gradients", "policy", "of the adapter, equal to the float32 reference's, by dtype", "policy:gradients"),
    Check("memory-in-use", "policy", "within 10% of what weights and adapter take", "policy:memory"),
    Check("training-arguments", "training", "changes name real arguments, with reasons", "training:arguments"),
    Check("trains-adapter-only", "training", "two steps change the adapter, nothing else", "training:adapter_only"),
    Check("resumes", "training", "a checkpoint is taken up where it was left", "training:resumes"),
    Check("sampler-is-policy", "sampling", "draws from what is trained, before and after a step", "sampling:sampler"),
    Check("reference-is-start", "sampling", "with beta > 0 the reference is the model as given", "training:reference"),
    Check("export-adapter", "saving", "loads back as the same policy", "saving:export", "adapter"),
    Check("export-merged-16bit", "saving", "loads back as the same policy", "saving:export", "merged-16bit"),
    Check("export-merged-4bit", "saving", "loads back as the same policy", "saving:export", "merged-4bit"),
    Check("export-gguf", "saving", "is written whole where claimed", "saving:export", "gguf"),
    Check("setting-fast-inference", "engine", "only where claimed, sampling the policy", "engine:fast_inference"),
    Check("setting-revision", "alone", "another revision gives other weights", "alone:revision"),
    Check("setting-full-finetuning", "alone", "every weight is trained and saved", "alone:full_finetuning"),
)


def select(only: Sequence[str] | None = None, *, in_process: bool = False) -> list[Check]:
    """The checks that `only` names, by their own name or their group's; all of them for None.

    Raises:
        ConfigError: a name that is neither.
    """
    known = {check.name for check in CHECKS} | set(GROUPS)
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise ConfigError(
            f"unknown check {', '.join(map(repr, unknown))}; groups: {', '.join(GROUPS)}; "
            f"checks: {', '.join(check.name for check in CHECKS)}."
        )
    return [
        check
        for check in CHECKS
        if (only is None or check.name in only or check.group in only)
        and not (in_process and check.group in NEEDS_OWN_PROCESS)
    ]
