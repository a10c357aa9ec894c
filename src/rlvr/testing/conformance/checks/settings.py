"""Every field of `ModelSettings`: honoured where claimed, refused where not."""

from __future__ import annotations

import gc
import json
import sys
from contextlib import suppress
from typing import Any, get_args

import torch

from rlvr.backends.protocol import (
    CHOICES,
    PROTOCOL_VERSION,
    Capabilities,
    ExportFormat,
    LoadedPolicy,
    LoraSettings,
)
from rlvr.errors import RlvrError
from rlvr.testing.conformance.context import (
    CheckFailed,
    Context,
    expect,
    expect_random_states,
    first_line,
    logits,
    random_states,
    tokens,
)

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def capabilities(context: Context) -> str:
    claims = context.capabilities
    expect(isinstance(claims, Capabilities), f"capabilities() returned {type(claims).__name__}, not Capabilities")
    expect(
        context.backend.protocol_version == PROTOCOL_VERSION,
        f"protocol_version is {context.backend.protocol_version}; this rlvr has {PROTOCOL_VERSION}",
    )
    claimed = {
        "dtype": claims.dtypes,
        "quantization": claims.quantizations,
        "attention": claims.attentions,
        "bias": claims.lora_biases,
        "init": claims.lora_inits,
        "export_formats": frozenset(claims.export_formats),
    }
    choices = {**CHOICES, "export_formats": get_args(ExportFormat)}
    for name, values in claimed.items():
        unknown = sorted(set(values) - set(choices[name]))
        expect(
            not unknown, f"claims unknown values of {name}: {', '.join(unknown)}; allowed: {', '.join(choices[name])}"
        )
    usual = {"dtype": "auto", "quantization": "none", "attention": "auto", "bias": "none", "init": "default"}
    lacking = [f"{name}={value!r}" for name, value in usual.items() if value not in claimed[name]]
    expect(not lacking, f"does not claim the defaults {', '.join(lacking)}, so that nobody could use it")
    expect("adapter" in claims.export_formats, "does not claim to save adapters, so that no run could end")
    expect(claims == context.backend.capabilities(), "capabilities() gives another answer when asked again")
    return f"exports {', '.join(claims.export_formats)}; dtypes {', '.join(sorted(claims.dtypes))}"


def model(context: Context) -> str:
    """That the weights are the checkpoint's, to the last bit of float32, is for the check `log-probabilities`."""
    policy = context.policy()
    said = policy.settings.model
    expect(said == context.model, f"model={context.model!r} was asked for, and LoadedPolicy.settings says {said!r}")
    expect(policy.lora is None, "load_policy applied a LoRA; that is for apply_lora")
    expect(policy.tokenizer.pad_token_id is not None, "the tokenizer came without a pad token")
    context.backend.for_inference(policy)
    expect(policy.tokenizer.padding_side == "left", "for sampling, the tokenizer has to pad on the left")
    one, other = context.policy(model=context.tiny(seed=0)), context.policy(model=context.tiny(seed=1))
    same_ids = tokens(one)
    expect(
        not torch.equal(logits(context, one, same_ids), logits(context, other, same_ids)),
        "two different model folders gave the same policy",
    )
    broken = context.folder()
    (broken / "config.json").write_text("{}")
    context.expect_refusal("a model folder without weights", model=broken)
    context.expect_refusal("a model folder that does not exist", model=broken / "missing")
    return "weights follow the folder; broken folders are refused"


def max_seq_length(context: Context) -> str:
    policy = context.policy()
    longest = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        context.expect_refusal(
            f"max_seq_length={longest + 1} for a model that takes {longest}", max_seq_length=longest + 1
        )
    length = 200
    row = tokens(policy)[:1].repeat(1, length)[:, :length]
    expect(
        logits(context, context.policy(max_seq_length=length), row).isfinite().all(),
        f"a sequence of max_seq_length={length} tokens gave logits that are not finite",
    )
    return f"{length} tokens work; more than {longest} are refused"


def dtype(context: Context) -> str:
    honoured, default = [], torch.get_default_dtype()
    for name in CHOICES["dtype"]:
        if name not in context.capabilities.dtypes:
            context.expect_refusal(f"dtype={name!r}, which is not claimed,", dtype=name)
            continue
        policy = claimed(context, dtype=name)
        left = torch.get_default_dtype()
        torch.set_default_dtype(default)
        expect(left == default, f"dtype={name!r}: loading leaves torch's default dtype at {_words({left})}")
        found = weight_dtypes(policy)
        if name == "auto":
            expect(len(found) == 1 and found <= set(FLOATS.values()), f"dtype='auto' gave weights in {_words(found)}")
        else:
            expect(found == {FLOATS[name]}, f"dtype={name!r} was asked for, and the weights are in {_words(found)}")
        computes_in = next(iter(found))
        changes = context.changes(policy)
        for flag, meant in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            expect(
                changes.get(flag, computes_in is meant) == (computes_in is meant),
                f"dtype={name!r}: training_arguments sets {flag}={changes.get(flag)} for weights in {_words(found)}",
            )
        honoured.append(name)
    return f"honoured: {', '.join(honoured)}; the others are refused"


def weight_dtypes(policy: LoadedPolicy) -> set[torch.dtype]:
    """Of embeddings and linear layers; norms may be kept in float32."""
    layers = [module for module in policy.model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    return {layer.weight.dtype for layer in layers if layer.weight.is_floating_point()}


def quantization(context: Context) -> str:
    errors: dict[str, float] = {}
    plain: torch.Tensor | None = None
    for name in CHOICES["quantization"]:
        if name == "none":
            continue
        if name not in context.capabilities.quantizations:
            context.expect_refusal(f"quantization={name!r}, which is not claimed,", quantization=name)
            continue
        if plain is None:
            plain = logits(context, context.policy(dtype="auto"))
        found = logits(context, claimed(context, dtype="auto", quantization=name))
        expect(found.isfinite().all(), f"quantization={name!r} gives logits that are not finite")
        error = ((found - plain).norm() / (plain - plain.mean()).norm()).item()
        expect(error > 0, f"quantization={name!r} was asked for, and the logits are those of unquantized weights")
        expect(error < 0.5, f"quantization={name!r}: the logits are off by {error:.0%} of their spread")
        errors[name] = error
    if len(errors) == 2:
        expect(
            errors["8bit"] < errors["4bit"],
            f"8 bits move the logits by {errors['8bit']:.1%} and 4 bits by {errors['4bit']:.1%}; 8 have to be nearer",
        )
    honoured = [f"{name} (logits move by {error:.1%})" for name, error in errors.items()]
    return f"honoured: {', '.join(honoured) or 'none'}; the others are refused"


def attention(context: Context) -> str:
    honoured = []
    for name in CHOICES["attention"]:
        if name not in context.capabilities.attentions:
            context.expect_refusal(f"attention={name!r}, which is not claimed,", attention=name)
            continue
        half = {"dtype": "bfloat16"} if name == "flash_attention_2" else {}
        policy = claimed(context, attention=name, **half)
        used = getattr(policy.model.config, "_attn_implementation", None)
        expect(name in ("auto", used), f"attention={name!r} was asked for, and the model uses {used!r}")
        expect(logits(context, policy).isfinite().all(), f"attention={name!r} gives logits that are not finite")
        honoured.append(name)
    return f"honoured: {', '.join(honoured)}; the others are refused"


def remote_code(context: Context) -> str:
    """A model folder whose own code leaves a trace when it runs."""
    folder, module = _with_own_code(context)

    def ran() -> bool:
        return any(name.endswith(module) for name in sys.modules)

    with suppress(RlvrError):  # a backend may refuse a model that comes with code
        context.policy(model=folder, trust_remote_code=False)
    expect(not ran(), "trust_remote_code=False, and the code that came with the model ran all the same")
    if not context.capabilities.trust_remote_code:
        context.expect_refusal("trust_remote_code=True, which is not claimed,", model=folder, trust_remote_code=True)
        return "refused, and never run"
    claimed(context, model=folder, trust_remote_code=True)
    expect(ran(), "trust_remote_code=True is claimed, and the code that came with the model did not run")
    return "runs when asked, and only then"


def _with_own_code(context: Context) -> tuple[Any, str]:
    from rlvr.testing.conformance.context import LIVELY
    from rlvr.testing.tiny import save_tiny

    folder = save_tiny(context.folder() / "own_code", **LIVELY)
    module = f"modeling_{context.folder().name.replace('-', '_')}"  # never run before in this process
    (folder / f"{module}.py").write_text(
        "from transformers import Qwen2ForCausalLM\n\n\nclass OwnForCausalLM(Qwen2ForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"{module}.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, module


def checkpointing(context: Context) -> str:
    """On: the model checkpoints, or the trainer is left to. Off: neither. On, less is kept for the backward pass.

    In training after inference, as in a run that evaluates.
    """
    kept = {}
    for asked in (True, False):
        policy = context.policy(LoraSettings(r=4), gradient_checkpointing=asked)
        context.backend.for_inference(policy)
        context.backend.for_training(policy)
        changes = context.changes(policy)
        in_model = any(getattr(module, "gradient_checkpointing", False) for module in policy.model.modules())
        by_trainer = changes.get("gradient_checkpointing", asked)
        expect(
            (in_model or by_trainer) == asked,
            f"gradient_checkpointing={asked}: the model {'does' if in_model else 'does not'} checkpoint, and "
            f"training_arguments leaves the trainer's at {by_trainer}",
        )
        if by_trainer:
            policy.model.gradient_checkpointing_enable(changes.get("gradient_checkpointing_kwargs"))
        kept[asked] = _kept_for_backward(policy)
    expect(
        kept[True] < kept[False],
        f"gradient_checkpointing=True keeps {kept[True]:,} bytes for the backward pass, and False {kept[False]:,}: "
        "nothing is checkpointed",
    )
    return f"on and off are honoured: {kept[True]:,} and {kept[False]:,} bytes are kept for the backward pass"


def _kept_for_backward(policy: LoadedPolicy) -> int:
    """Bytes that a forward pass in training keeps: allocated ones on a GPU, since autograd's hooks do not see what
    compiled blocks keep; elsewhere those of the tensors that the hooks see, weights included."""
    ids = tokens(policy).repeat(1, 8)
    sizes = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.random.fork_rng():
        if not ids.is_cuda:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                policy.model(input_ids=ids, labels=ids)
            return sum(sizes)
        policy.model(input_ids=ids, labels=ids).loss.backward()  # what the first pass compiles and caches stays
        policy.model.zero_grad(set_to_none=True)
        gc.collect()
        before = torch.cuda.memory_allocated(ids.device)
        kept = policy.model(input_ids=ids, labels=ids)
        allocated = torch.cuda.memory_allocated(ids.device) - before
        del kept
    return allocated


def device(context: Context) -> str:
    wanted = torch.device(context.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    policy = context.policy(device=str(wanted) if context.device else None)
    found = {parameter.device for parameter in policy.model.parameters()}
    expect(
        all(device.type == wanted.type and wanted.index in (None, device.index) for device in found),
        f"device={str(wanted)!r}, and parameters are on {', '.join(sorted(map(str, found)))}",
    )
    absent = f"cuda:{torch.cuda.device_count()}"
    context.expect_refusal(f"device={absent!r}, which this machine does not have,", device=absent)
    return f"on {wanted}; {absent} is refused"


def seed(context: Context) -> str:
    before = random_states()
    policies = [context.policy(seed=7) for _ in range(2)]
    expect_random_states(before, "loading a policy")
    one, other = (logits(context, policy) for policy in policies)
    expect(torch.equal(one, other), "two loads with one seed gave different policies")
    return "one seed, one policy"


def claimed(context: Context, **settings: Any) -> LoadedPolicy:
    """Loads with settings that the backend claims: a refusal is a finding."""
    try:
        return context.policy(**settings)
    except Exception as error:
        words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise CheckFailed(
            f"{words}: capabilities() claims it, and loading raised {type(error).__name__}: {first_line(error)}"
        ) from error


def _words(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "no float type"
