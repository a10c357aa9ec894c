"""The packed forward against its slow twin, the padded forward of an untouched model with log_softmax."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlvr.fused import flash
from rlvr.fused.lora import fuse_lora
from rlvr.testing.tiny import tiny_model
from rlvr.trainers.shared_prefix import (
    SUPPORTED_MODEL_TYPES,
    attention,
    enable,
    group_order,
    pack_rows,
    shared_prefix_logps,
    unsupported_reason,
)
from rlvr.trainers.shared_prefix.attention import TreeLayout, _Spread, tree_attention
from rlvr.trainers.shared_prefix.packing import IGNORED, Group

TEMPERATURE = 0.7
ISSUE_ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3")
WINDOWS = {
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 4},
}


def make_batch(prompt_of_row, completion_lengths, prompt_lengths, *, columns=(14, 7), seed=0):
    """Rows as TRL pads them; row r continues prompt `prompt_of_row[r]`. Masked columns hold real ids."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 259, (length,), generator=generator) for length in prompt_lengths]
    prompt_columns, completion_columns = columns
    input_ids = torch.zeros(len(prompt_of_row), sum(columns), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, (which, length) in enumerate(zip(prompt_of_row, completion_lengths, strict=True)):
        prompt = prompts[which]
        input_ids[row, prompt_columns - len(prompt) : prompt_columns] = prompt
        attention_mask[row, prompt_columns - len(prompt) : prompt_columns + length] = 1
        input_ids[row, prompt_columns:] = torch.randint(3, 259, (completion_columns,), generator=generator)
    return input_ids, attention_mask, completion_columns


def ragged_batch():
    """Groups of 3, 4, 1 and 1, shuffled; prompts of 5, 9, 1 and 12 tokens; one row masked throughout."""
    return make_batch([0, 1, 0, 2, 1, 3, 0, 1, 1], [4, 7, 7, 3, 0, 2, 1, 5, 6], [5, 9, 1, 12])


def even_batch():
    return make_batch([0, 0, 1, 1], [7, 7, 7, 7], [14, 14])


def attach_head(model, temperature=TEMPERATURE):
    """TRL's fused head; where TRL's needs Triton and there is none (1.15 on a CPU), its contract in torch."""
    import trl
    from packaging.version import Version
    from trl.trainer.utils import add_fused_lm_head

    if Version(trl.__version__) >= Version("1.16") or torch.cuda.is_available():
        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
        return model
    original = model.forward

    def forward(*args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
        if not fused_lm_head:
            return original(*args, **kwargs)
        logits = original(*args, use_cache=False, **kwargs).logits
        if shift_labels is None:
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        log_probs, entropy = score(logits, shift_labels.clamp(min=0), temperature)
        scored = shift_labels != IGNORED
        return SimpleNamespace(log_probs=log_probs * scored, entropy=entropy * scored)

    model.forward = forward
    return model


def score(logits, targets, temperature=TEMPERATURE):
    log_p = (logits.float() / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def padded(model, batch):
    """The oracle: transformers' own padded forward."""
    input_ids, attention_mask, columns = batch
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logps, entropies = score(logits[:, -columns - 1 : -1], input_ids[:, -columns:])
    kept = attention_mask[:, -columns:]
    return logps * kept, entropies * kept


def gradients(model, logps, entropies):
    """Of an arbitrary weighting of both outputs, as a loss with an entropy bonus would give."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *logps.shape, generator=generator).to(logps.device)
    model.zero_grad()
    (logps * weights[0] + 0.3 * entropies * weights[1]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_lora(model):
    """LoRA on every linear layer, with B away from zero so that A has a gradient."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def prepare(model, *, lora=False, checkpointing=False):
    """The same model twice: untouched for the oracle, and with the fused head."""
    oracle, model = copy.deepcopy(model), attach_head(model)
    models = [with_lora(m) if lora else m for m in (oracle, model)]
    for m in models:
        m.train()
    if checkpointing:
        models[1].gradient_checkpointing_enable({"use_reentrant": False})
    return models


def assert_parity(oracle, model, batch, *, logp_tolerance=1e-5, gradient_tolerance=1e-4):
    expected, expected_entropy = padded(oracle, batch)
    logps, entropies, _ = shared_prefix_logps(model, *batch, compute_entropy=True)
    torch.testing.assert_close(logps, expected, rtol=0, atol=logp_tolerance)
    torch.testing.assert_close(entropies, expected_entropy, rtol=0, atol=logp_tolerance)
    expected_gradients = gradients(oracle, expected, expected_entropy)
    actual = gradients(model, logps, entropies)
    assert actual.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-8)
        assert error < gradient_tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ISSUE_ARCHITECTURES)
def test_parity_with_the_padded_forward(architecture, lora, checkpointing):
    oracle, model = prepare(tiny_model(architecture), lora=lora, checkpointing=checkpointing)
    assert unsupported_reason(model) is None
    assert_parity(oracle, model, ragged_batch())


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_parity_with_fused_lora_layers(architecture):
    oracle, model = prepare(tiny_model(architecture), lora=True, checkpointing=True)
    assert fuse_lora(model) > 0
    assert unsupported_reason(model) is None
    assert_parity(oracle, model, ragged_batch())


@pytest.mark.parametrize("architecture", sorted(SUPPORTED_MODEL_TYPES - set(ISSUE_ARCHITECTURES)))
def test_parity_of_the_further_architectures(architecture):
    oracle, model = prepare(tiny_model(architecture))
    assert unsupported_reason(model) is None
    assert_parity(oracle, model, ragged_batch())


@pytest.mark.parametrize("architecture", sorted(WINDOWS))
def test_parity_with_sliding_windows(architecture):
    oracle, model = prepare(tiny_model(architecture, **WINDOWS[architecture]), checkpointing=True)
    full, _ = padded(tiny_model(architecture), ragged_batch())
    windowed, _ = padded(oracle, ragged_batch())
    assert (full - windowed).abs().max() > 1e-3  # the window matters at this length
    assert_parity(oracle, model, ragged_batch())


@pytest.mark.parametrize(
    "batch",
    [
        even_batch(),
        make_batch([0], [7], [14]),
        make_batch([0, 1, 2], [3, 1, 7], [1, 1, 14]),
        make_batch([0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 5, 5], [6, 3]),
        make_batch([0, 0, 0], [0, 0, 4], [6]),
    ],
    ids=["even, no padding", "one row", "singletons", "group cut by the micro-batch", "only one row counts"],
)
def test_parity_of_other_shapes(batch):
    oracle, model = prepare(tiny_model("qwen2"))
    assert_parity(oracle, model, batch)


@pytest.mark.parametrize("extra", [{"tie_word_embeddings": True}, {"attention_bias": True}])
def test_parity_of_tied_heads_and_biases(extra):
    assert_parity(*prepare(tiny_model("llama", **extra)), ragged_batch())


def test_equals_trl_method():
    from trl import GRPOTrainer

    model = attach_head(tiny_model("qwen2"))
    input_ids, attention_mask, columns = ragged_batch()
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=False))
    expected, expected_entropy, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, model, input_ids, attention_mask, columns, compute_entropy=True
    )
    logps, entropies, _ = shared_prefix_logps(model, input_ids, attention_mask, columns, compute_entropy=True)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropy, rtol=0, atol=1e-5)


def test_order_of_rows_does_not_matter():
    model = attach_head(tiny_model("qwen2"))
    input_ids, attention_mask, columns = ragged_batch()
    order = torch.randperm(len(input_ids), generator=torch.Generator().manual_seed(3))
    logps, _, packed = shared_prefix_logps(model, input_ids, attention_mask, columns)
    shuffled, none, repacked = shared_prefix_logps(model, input_ids[order], attention_mask[order], columns)
    assert none is None
    assert repacked.packed_tokens == packed.packed_tokens
    torch.testing.assert_close(shuffled, logps[order], rtol=0, atol=1e-5)


def test_nothing_to_score_gives_differentiable_zeros():
    model = attach_head(tiny_model("qwen2"))
    logps, entropies, _ = shared_prefix_logps(model, *make_batch([0, 0], [0, 0], [6]), compute_entropy=True)
    assert not logps.any()
    assert not entropies.any()
    (logps.sum() + entropies.sum()).backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_autocast_in_bfloat16():
    oracle, model = prepare(tiny_model("qwen3"), lora=True, checkpointing=True)
    batch = ragged_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logps, entropies, _ = shared_prefix_logps(model, *batch, compute_entropy=True)
    assert logps.dtype == entropies.dtype == torch.float32
    expected, expected_entropy = padded(oracle, batch)
    torch.testing.assert_close(logps, expected, rtol=0, atol=0.05)
    actual, wanted = gradients(model, logps, entropies), gradients(oracle, expected, expected_entropy)
    for name, gradient in wanted.items():
        assert torch.cosine_similarity(actual[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_through_distributed_data_parallel(tmp_path):
    """The wrapper's own forward runs, so its gradient hooks do."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        oracle, model = prepare(tiny_model("qwen2"), lora=True)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert unsupported_reason(wrapped) is None
        reduced = []
        wrapped.register_comm_hook(None, lambda _, bucket: _note(reduced, bucket))
        logps, entropies, _ = shared_prefix_logps(wrapped, *ragged_batch(), compute_entropy=True)
        actual = gradients(model, logps, entropies)
        expected = gradients(oracle, *padded(oracle, ragged_batch()))
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)
        assert sum(reduced) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def _note(reduced, bucket):
    reduced.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_other_forwards_are_left_alone():
    model, untouched = tiny_model("gemma3_text"), tiny_model("gemma3_text")
    enable(model)
    enable(model)
    input_ids, attention_mask, _ = ragged_batch()
    torch.testing.assert_close(
        model(input_ids=input_ids, attention_mask=attention_mask).logits,
        untouched(input_ids=input_ids, attention_mask=attention_mask).logits,
        rtol=0,
        atol=0,
    )
    options = {"attention_mask": attention_mask, "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(model.generate(input_ids, **options), untouched.generate(input_ids, **options))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_transformers_still_finds_flash_kernels_by_their_name(monkeypatch, name):
    """A stand-in for the kernel, which transformers loads by the name in the configuration at each forward."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    asked = []

    def kernel(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False, **_):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        options = {"scale": softmax_scale, "is_causal": causal, "enable_gqa": True}
        return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    def load(implementation, *_, **__):
        asked.append(implementation)
        return kernel, kernel, None, None, None

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", load)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    expected = shared_prefix_logps(attach_head(tiny_model("qwen2")), *ragged_batch())[0]
    model = attach_head(tiny_model("qwen2"))
    model.config._attn_implementation = name
    assert unsupported_reason(model) is None
    torch.testing.assert_close(shared_prefix_logps(model, *ragged_batch())[0], expected)
    assert asked == []  # the packed forward has its own
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, tiny_model("qwen2")(input_ids=ids).logits)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert set(asked) == {name}


def test_a_model_that_drops_the_layout_raises():
    """Nemotron does not hand its keyword arguments to attention: wrong numbers must not come out."""
    model = attach_head(tiny_model("nemotron"))
    assert "no parity test" in unsupported_reason(model)
    with pytest.raises(RuntimeError, match="size"):
        shared_prefix_logps(model, *ragged_batch())


# Packing, by hand.


def test_packing_by_hand():
    input_ids = torch.tensor([[0, 11, 12, 21, 22, 9], [5, 6, 7, 31, 9, 9], [0, 11, 12, 41, 9, 9]])
    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]])
    packed = pack_rows(input_ids, attention_mask, 3)
    assert packed.groups == (Group(0, 1, (2, 1)), Group(4, 2, (1,)))
    assert packed.input_ids.tolist() == [[11, 12, 21, 12, 5, 6, 7]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1, 0, 1, 2]]
    assert packed.labels.tolist() == [[IGNORED, 21, 22, 41, IGNORED, IGNORED, 31]]
    assert (packed.padded_tokens, packed.packed_tokens) == (18, 7)
    values = torch.tensor([[0.0, 1, 2, 3, 0, 0, 4]])
    assert packed.unpack(values, 3, 3).tolist() == [[1, 2, 0], [4, 0, 0], [3, 0, 0]]


def test_prompts_that_differ_only_in_padding_are_told_apart():
    """A prompt that starts with the padding token is not the shorter prompt without it."""
    input_ids = torch.tensor([[0, 11, 12, 21], [0, 11, 12, 21]])
    attention_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert [group.trunk for group in pack_rows(input_ids, attention_mask, 1).groups] == [1, 2]


def test_token_savings_of_the_reference_shape():
    """8 completions of 256 tokens on one prompt of 2,048: 4,095 tokens instead of 18,432."""
    input_ids = torch.arange(2304).repeat(8, 1)
    packed = pack_rows(input_ids, torch.ones_like(input_ids), 256)
    assert (packed.packed_tokens, packed.padded_tokens) == (2047 + 8 * 256, 8 * 2304)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("batch", [ragged_batch(), even_batch()], ids=["ragged", "even"])
def test_segments_for_the_flash_kernel_say_the_same(batch, window):
    """Attention segment by segment, as the variable-length kernel computes it, equals attention by group."""
    groups = pack_rows(*batch).groups
    layout = TreeLayout.of(groups, torch.device("cpu"))
    segments, key_index = layout.segments
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, groups[-1].end, 8, generator=generator) for heads in (4, 2, 2))
    parts = []
    for i in range(len(segments.query_starts) - 1):
        rows = slice(segments.query_starts[i], segments.query_starts[i + 1])
        keys = key_index[segments.key_starts[i] : segments.key_starts[i + 1]]
        position = torch.arange(len(keys))
        distance = position[len(keys) - (rows.stop - rows.start) :, None] - position
        mask = (distance >= 0) & (distance < (window or 10**6))
        q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True))
        assert len(keys) <= segments.longest_key == layout.longest
        assert rows.stop - rows.start <= segments.longest_query
    expected = torch.cat(parts, 2).transpose(1, 2)
    actual = tree_attention(query, key, value, layout, scale=0.3, sliding_window=window)
    torch.testing.assert_close(actual, expected)


class PlainFlash:
    """The two flash functions in plain torch, segment by segment, with the kernel's contract: the backward pass takes
    output and sum of exponentials as they are given."""

    @staticmethod
    def pieces(query, key, segments, scale, causal):
        """(queries, keys, scores (H, n, m)) of each segment."""
        for i in range(len(segments.query_starts) - 1):
            rows = slice(segments.query_starts[i], segments.query_starts[i + 1])
            keys = slice(segments.key_starts[i], segments.key_starts[i + 1])
            assert 0 < rows.stop - rows.start <= segments.longest_query
            assert 0 < keys.stop - keys.start <= segments.longest_key
            repeated = key[keys].repeat_interleave(query.shape[1] // key.shape[1], 1)
            scores = scale * torch.einsum("nhd,mhd->hnm", query[rows], repeated)
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
            yield rows, keys, scores

    @classmethod
    def varlen_forward(cls, query, key, value, segments, *, scale, causal):
        output, logsumexp = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query))
        for rows, keys, scores in cls.pieces(query, key, segments, scale, causal):
            repeated = value[keys].repeat_interleave(query.shape[1] // value.shape[1], 1)
            output[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), repeated)
            logsumexp[:, rows] = scores.logsumexp(-1)
        return output, logsumexp

    @classmethod
    def varlen_backward(cls, grad, query, key, value, output, logsumexp, segments, *, scale, causal):
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        repeats = query.shape[1] // key.shape[1]
        for rows, keys, scores in cls.pieces(query, key, segments, scale, causal):
            weights = (scores - logsumexp[:, rows, None]).exp()
            of_weights = torch.einsum("nhd,mhd->hnm", grad[rows], value[keys].repeat_interleave(repeats, 1))
            of_output = (grad[rows] * output[rows]).sum(-1).t()[..., None]
            of_scores = scale * weights * (of_weights - of_output)
            repeated = key[keys].repeat_interleave(repeats, 1)
            grads[0][rows] = torch.einsum("hnm,mhd->nhd", of_scores, repeated)
            for whole, part in (
                (grads[1], torch.einsum("hnm,nhd->mhd", of_scores, query[rows])),
                (grads[2], torch.einsum("hnm,nhd->mhd", weights, grad[rows])),
            ):
                whole[keys] = part.unflatten(1, (-1, repeats)).sum(2)
        return grads


@pytest.fixture
def plain_flash(monkeypatch):
    """The flash kernel's ways, computed in plain torch. Says how often each of the two was gone."""
    gone = Counter()
    monkeypatch.setattr(flash, "varlen_forward", PlainFlash.varlen_forward)
    monkeypatch.setattr(flash, "varlen_backward", PlainFlash.varlen_backward)
    monkeypatch.setattr(flash, "takes", lambda query: True)
    monkeypatch.setattr(TreeLayout, "of", lambda groups, device, use_flash=True: TreeLayout(groups, device, use_flash))
    for way in ("split_flash", "_repeated_flash"):
        own = getattr(attention, way)
        monkeypatch.setattr(
            attention, way, lambda *args, _own=own, _way=way, **kw: gone.update([_way]) or _own(*args, **kw)
        )
    return gone


@pytest.mark.parametrize(
    "groups",
    [
        pack_rows(*ragged_batch()).groups,
        pack_rows(*even_batch()).groups,
        (Group(0, 0, (3,)), Group(3, 0, (1, 2))),  # prompts of one token have no trunk
    ],
    ids=["ragged", "even", "no trunk"],
)
def test_attention_in_two_parts_equals_attention_by_group(groups, plain_flash):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, groups[-1].end, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    outputs = [
        tree_attention(*tensors, TreeLayout(groups, torch.device("cpu"), use_flash), scale=0.3)
        for use_flash in (True, False)
    ]
    assert plain_flash == {"split_flash": 1}
    torch.testing.assert_close(*outputs)
    weights = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((output * weights).sum(), tensors) for output in outputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("architecture", sorted(SUPPORTED_MODEL_TYPES))
def test_parity_with_attention_in_two_parts(architecture, plain_flash):
    """Queries come in whatever memory layout the architecture gives them."""
    oracle, model = prepare(tiny_model(architecture), checkpointing=True)
    assert_parity(oracle, model, ragged_batch())
    assert set(plain_flash) == {"split_flash"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_that_is_kept_is_computed_once(plain_flash, monkeypatch, reentrant):
    """Its gradients are those of attention that is computed again, bit for bit; also of two forwards at a time."""
    forwards, ways = [], {}
    own = flash.varlen_forward
    monkeypatch.setattr(flash, "varlen_forward", lambda *args, **kw: forwards.append(1) or own(*args, **kw))
    monkeypatch.setattr(attention, "free_on_gpu", lambda device: 2**40)
    for keep in (False, True):
        _, model = prepare(tiny_model(), checkpointing=True)
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        passes = [
            shared_prefix_logps(model, *batch, compute_entropy=True, keep_attention=keep)[:2]
            for batch in (ragged_batch(), even_batch())
        ]
        logps, entropies = (torch.cat([values.flatten() for values in part]) for part in zip(*passes, strict=True))
        ways[keep] = logps, gradients(model, logps, entropies), len(forwards)
        forwards.clear()
    calls = 2 * 2 * tiny_model().config.num_hidden_layers  # two forwards, of two calls of the kernel a layer
    assert (ways[False][2], ways[True][2]) == (2 * calls, calls)
    assert torch.equal(ways[True][0], ways[False][0])
    assert ways[False][1]
    for name, gradient in ways[False][1].items():
        assert torch.equal(ways[True][1][name], gradient), name


def test_attention_is_kept_where_it_takes_a_quarter_of_the_free_memory(plain_flash, monkeypatch):
    layouts = []
    _, model = prepare(tiny_model(layers=3, hidden_size=32, heads=4, kv_heads=2), checkpointing=True)
    monkeypatch.setattr(
        attention,
        "tree_attention",
        lambda *args, own=tree_attention, **kw: layouts.append(args[3]) or own(*args, **kw),
    )
    batch = ragged_batch()
    needed = pack_rows(*batch).packed_tokens * 3 * 4 * (8 * 4 + 4)  # tokens, layers, heads; float32 numbers and a sum
    for free, asked, kept in ((4 * needed, True, True), (4 * needed - 1, True, False), (4 * needed, False, False)):
        monkeypatch.setattr(attention, "free_on_gpu", lambda device, free=free: free)
        shared_prefix_logps(model, *batch, keep_attention=asked)
        assert all((layout.kept is not None) == kept for layout in layouts[-3:])
    shared_prefix_logps(model, *batch, flash=False, keep_attention=True)  # nothing is asked for that no kernel gives
    assert layouts[-1].kept is None
    assert len(layouts) == 4 * 3


def test_a_window_that_cuts_a_prompt_takes_the_other_way(plain_flash, monkeypatch):
    monkeypatch.setattr(flash, "varlen_flash", lambda query, *args, **kwargs: query)
    groups = pack_rows(*ragged_batch()).groups
    layout = TreeLayout(groups, torch.device("cpu"), True)
    query, key, value = (torch.randn(1, heads, groups[-1].end, 8) for heads in (4, 2, 2))
    for window in (None, layout.longest, layout.longest - 1):
        tree_attention(query, key, value, layout, scale=1.0, sliding_window=window)
    assert plain_flash == {"split_flash": 2, "_repeated_flash": 1}


def test_gradients_of_repeated_keys_are_rounded_once():
    index = torch.tensor([0, 1, 0, 2] + [0] * 100)
    x = torch.randn(3, 2, 4).to(torch.bfloat16).requires_grad_()
    rows = _Spread.apply(x, index)
    assert torch.equal(rows, x[index])
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows.backward(grad)
    exact = torch.zeros(3, 2, 4, dtype=torch.float64).index_add_(0, index, grad.double())
    torch.testing.assert_close(x.grad, exact.to(torch.bfloat16))


def test_group_order_keeps_groups_together():
    keys = [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    orders = [group_order(keys, torch.Generator().manual_seed(seed)).tolist() for seed in range(20)]
    for order in orders:
        assert sorted(order) == list(range(10))
        ordered = [keys[row] for row in order]
        assert sum(a != b for a, b in pairwise(ordered)) == 3
    assert len({tuple(order) for order in orders}) > 15
    assert len({keys[order[0]] for order in orders}) > 1
    assert group_order([]).tolist() == []


# What is refused.


def _with_config(architecture="qwen2", **values):
    model = tiny_model(architecture)
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


def _with_copied_config():
    model = tiny_model("qwen2")
    model.config = copy.deepcopy(model.config)
    return model


def _unsloth_patched():
    model = tiny_model("qwen2")

    def forward(*args):
        return None

    forward.__module__ = "unsloth.models.llama"
    model.model.layers[0].self_attn.forward = forward
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: _with_config(_attn_implementation="eager"), "'eager'"),
        (lambda: _with_config(attention_dropout=0.1), "attention_dropout is 0.1"),
        (lambda: _with_config("gemma3_text", attn_logit_softcapping=50.0), "softcapping"),
        (lambda: _with_config("gemma3_text", use_bidirectional_attention=True), "bidirectional"),
        (lambda: _with_config("llama", rope_parameters={"rope_type": "dynamic"}), "'dynamic'"),
        (lambda: tiny_model("qwen2_moe"), "'qwen2_moe'"),
        (lambda: tiny_model("gpt2"), "'gpt2'"),
        (_with_copied_config, "model.layers.0.self_attn has a configuration of its own"),
        (
            lambda: _peft(LoraConfig(task_type="CAUSAL_LM", r=2, layer_replication=[(0, 2), (1, 2)]), "llama"),
            "has a configuration of its own",
        ),
        (_unsloth_patched, "Unsloth has replaced the forward of Qwen2Attention"),
        (lambda: torch.nn.DataParallel(tiny_model("qwen2")), "DataParallel"),
        (lambda: _peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "PROMPT_TUNING"),
        (
            lambda: _peft(LoraConfig(task_type="CAUSAL_LM", r=2, alora_invocation_tokens=[5])),
            "activated LoRA",
        ),
    ],
)
def test_refusals_name_the_reason(model, words):
    reason = unsupported_reason(model())
    assert words in reason
    assert "\n" not in reason


def _peft(config, architecture="qwen2"):
    return get_peft_model(tiny_model(architecture), config)


def test_rope_that_depends_on_the_batch_is_fine_below_its_limit():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 100}
    model = _with_config("phi3", rope_parameters=rope)
    assert unsupported_reason(model, longest_sequence=100) is None
    assert "longrope" in unsupported_reason(model, longest_sequence=101)


# On a GPU.


def _on_gpu(architecture, dtype, **options):
    model = tiny_model(architecture, hidden_size=64, **options)
    models = prepare(model, lora=True, checkpointing=True)
    return [model.to("cuda", dtype) for model in models], [
        part.cuda() if isinstance(part, torch.Tensor) else part for part in ragged_batch()
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ISSUE_ARCHITECTURES)
def test_parity_on_a_gpu_in_float32(architecture):
    torch.backends.cuda.matmul.allow_tf32 = False
    (oracle, model), batch = _on_gpu(architecture, torch.float32, **WINDOWS.get(architecture, {}))
    assert_parity(oracle, model, batch, logp_tolerance=3e-5, gradient_tolerance=3e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("windows", [True, False], ids=["windows", "no windows"])
@pytest.mark.parametrize("way", ["sdpa", "flash", "flash and fused LoRA"])
@pytest.mark.parametrize("architecture", [*ISSUE_ARCHITECTURES, "glm4"])
def test_parity_on_a_gpu_in_bfloat16(architecture, way, windows):
    """As near to the float32 truth as the padded forward in bfloat16 is, within a factor."""
    options = WINDOWS.get(architecture, {}) if windows else {}
    (_, model), batch = _on_gpu(architecture, torch.bfloat16, **options)
    (truth, padded_model), _ = _on_gpu(architecture, torch.float32, **options)
    padded_model.to(torch.bfloat16)
    if way == "flash and fused LoRA":
        assert fuse_lora(model) > 0
    expected, expected_entropy = padded(truth, batch)
    logps, entropies, _ = shared_prefix_logps(model, *batch, compute_entropy=True, flash=way != "sdpa")
    plain, plain_entropy = padded(padded_model, batch)
    assert (logps - expected).abs().max() <= 3 * (plain - expected).abs().max() + 1e-3
    wanted = gradients(truth, expected, expected_entropy)
    ours, theirs = gradients(model, logps, entropies), gradients(padded_model, plain, plain_entropy)
    for name, gradient in wanted.items():
        error, reference = ((g[name].float() - gradient).norm() / gradient.norm() for g in (ours, theirs))
        assert error <= 3 * reference + 1e-2, f"{name}: {error:.1e}, padded {reference:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "branches", [[(5, 1, 7), (2,)], [(1, 1, 1), (1,)], [(3,) * 64, (70, 130)]], ids=["ragged", "one token", "many"]
)
@pytest.mark.parametrize("trunks", [(0, 1), (200, 70)], ids=str)
def test_flash_in_two_parts_on_a_gpu(trunks, branches, dim):
    """Output and gradients against SDPA by group in float32; queries and gradients in layouts that models give."""
    groups, start = [], 0
    for trunk, lengths in zip(trunks, branches, strict=True):
        groups.append(Group(start, trunk, lengths))
        start = groups[-1].end
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, start, dim, generator=generator).to("cuda", torch.bfloat16) for heads in (6, 2, 2)
    ]
    weights = torch.randn(1, start, 6, dim, generator=generator).to("cuda", torch.bfloat16)
    results = []
    for dtype, use_flash in ((torch.bfloat16, True), (torch.float32, False)):
        layout = TreeLayout(tuple(groups), torch.device("cuda"), use_flash)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = tree_attention(*leaves, layout, scale=dim**-0.5)
        results.append([output, *torch.autograd.grad((output * weights.to(dtype)).sum(), leaves)])
    for ours, truth in zip(*results, strict=True):
        assert (ours.float() - truth).norm() <= 1e-2 * truth.norm() + 1e-3
