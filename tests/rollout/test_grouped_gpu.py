"""The grouped engine's kernels and graphs against their slow twins. See `test_grouped_parity.py` for what it plays."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped import GroupedEngine
from rlvr.rollout.grouped.attention import Decode, Prefill
from rlvr.rollout.grouped.cache import Cache, CacheShape
from rlvr.rollout.grouped.sampling import draw
from rlvr.testing.tiny import tiny_model

pytestmark = pytest.mark.gpu

PROMPTS = [[5], [7] * 70, [*range(3, 133)], [9, 8, 7] * 11]
BATCH = [PROMPTS[i] for i in (0, 1, 1, 2, 2, 2, 3, 1, 2)]
BUDGETS = [40, 7, 90, 100, 3, 64, 65, 17, 128]
ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 50},
    "gemma3_text": {"sliding_window": 40, "final_logit_softcapping": 20.0},
    "phi3": {"heads": 4, "kv_heads": 4},
}


def cuda_model(architecture="qwen2", dtype=torch.float32):
    arguments = {"hidden_size": 192, "heads": 6, "kv_heads": 2, "layers": 3, **ARCHITECTURES[architecture]}
    model = tiny_model(architecture, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.to("cuda", dtype)


def play(engine, budgets=BUDGETS, batch=BATCH):
    """Two turns each: (turn, the ids before it), in the order in which they ended."""
    source = random.Random(1)
    histories, waiting, played = [list(ids) for ids in batch], set(range(len(batch))), []
    with engine.open(batch, max_completion_tokens=300) as session:
        for index, budget in enumerate(budgets):
            session.submit(index, [], budget)
        while session.pending:
            for turn in session.step():
                played.append((turn, list(histories[turn.index])))
                histories[turn.index] += turn.token_ids
                if turn.index in waiting:
                    waiting.remove(turn.index)
                    new_ids = [source.randrange(3, 259) for _ in range(1 + 5 * turn.index)]
                    histories[turn.index] += new_ids
                    session.submit(turn.index, new_ids, 20)
    return played


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_graphs_complete_as_generate_does(architecture):
    model = cuda_model(architecture)
    engine = GroupedEngine(
        model, sampling=SamplingSettings(temperature=0), eos_token_ids=(), execution="graphs", compile_layers=True
    )
    play(engine)
    for turn, history in play(engine):  # the second rollout runs on the graphs of the first
        ids = torch.tensor([history], device="cuda")
        count = len(turn.token_ids)
        twin = model.generate(ids, do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0)
        assert turn.token_ids == twin[0, len(history) :].tolist()


def test_without_a_working_compiler_rollouts_go_on_and_say_so_once(monkeypatch, caplog):
    from torch._dynamo.exc import TorchDynamoException

    from rlvr.rollout.grouped import graphs

    def broken(*args, **kwargs):
        raise TorchDynamoException("no compiler")

    model = cuda_model()

    def completed(**settings):
        engine = GroupedEngine(model, sampling=SamplingSettings(temperature=0), eos_token_ids=(), **settings)
        return [(turn.index, turn.token_ids) for turn, _ in play(engine)]

    expected = completed(compile_layers=False)
    monkeypatch.setattr(graphs, "_compiled_forward", lambda layer_type: broken)
    assert completed(compile_layers=True) == expected
    assert [record.levelname for record in caplog.records if "torch.compile failed" in record.message] == ["WARNING"]
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_graphs_sample_what_the_kernels_sample_without_them(dtype):
    model = cuda_model(dtype=dtype)
    sampling = SamplingSettings(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1)

    def sampled(execution):
        engine = GroupedEngine(
            model, sampling=sampling, eos_token_ids=(2,), seed=3, execution=execution, compile_layers=False
        )
        return [[(turn.index, turn.token_ids) for turn, _ in play(engine)] for _ in range(2)]

    assert sampled("graphs") == sampled("kernels")


def test_reseeding_repeats_a_rollout_on_the_same_graphs():
    engine = GroupedEngine(
        cuda_model(), sampling=SamplingSettings(), eos_token_ids=(), seed=3, execution="graphs", compile_layers=False
    )

    def sampled():
        return [(turn.index, turn.token_ids) for turn, _ in play(engine)]

    first, second = sampled(), sampled()
    engine.reseed(3)
    assert sampled() == first != second


@pytest.mark.parametrize(("rollouts", "compiles"), [(26, False), (27, True)])  # of 300 token steps: 7,800 and 8,100
def test_layers_are_compiled_where_the_rollouts_pay_for_it(rollouts, compiles):
    engine = GroupedEngine(cuda_model(), sampling=SamplingSettings(), eos_token_ids=(), rollouts=rollouts)
    play(engine)
    assert engine.execution == "graphs"
    assert engine._runner.compile_layers is compiles


def test_a_rollout_after_a_training_step_replays_the_graphs_that_are_there():
    model = get_peft_model(cuda_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))

    def engine():
        return GroupedEngine(
            model, sampling=SamplingSettings(temperature=0), eos_token_ids=(), execution="graphs", compile_layers=False
        )

    def completed(engine):
        return [(turn.index, turn.token_ids) for turn, _ in play(engine)]

    kept = engine()
    before, graphs = completed(kept), dict(kept._runner.graphs)
    assert graphs
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    assert completed(kept) == completed(engine()) != before
    assert kept._runner.graphs == graphs  # the same objects


@pytest.mark.parametrize("execution", ["graphs", "eager"])
@pytest.mark.parametrize("merge_lora", [True, False], ids=["merged", "apart"])
def test_bfloat16_logprobs_stay_near_the_training_forward(merge_lora, execution):
    model = cuda_model(dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = GroupedEngine(
        model,
        sampling=SamplingSettings(),
        eos_token_ids=(),
        merge_lora=merge_lora,
        execution=execution,
        compile_layers=execution == "graphs",
    )
    played = play(engine)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    errors = []
    for turn, history in played:
        ids = torch.tensor([history + turn.token_ids], device="cuda")
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(history) - 1 : -1].float().log_softmax(-1)
        exact = logprobs.gather(1, torch.tensor(turn.token_ids, device="cuda")[:, None])[:, 0]
        errors.append((torch.tensor(turn.logprobs, device="cuda") - exact).abs())
    assert torch.cat(errors).mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(12, 2, 128, None), (28, 4, 128, None), (14, 2, 64, 40), (4, 4, 48, None), (8, 4, 256, 90), (16, 16, 96, 200)],
)
def test_kernels_attend_as_plain_torch_does(heads, kv_heads, dim, window, dtype):
    from rlvr.rollout.grouped.kernels import KernelDecode, tile_members, tiles_of

    torch.manual_seed(0)
    shape = CacheShape(
        groups=3, prompt_tokens=640, slots=40, suffix_tokens=320, layers=2, kv_heads=kv_heads, head_dim=dim
    )
    device = torch.device("cuda")
    fast, plain = Cache(shape, dtype=dtype, device=device), Cache(shape, dtype=torch.float32, device=device)
    for name in ("prompt_keys", "prompt_values", "suffix_keys", "suffix_values"):
        getattr(fast, name).normal_()
        getattr(plain, name).copy_(getattr(fast, name))  # the twin computes in float32 from the same numbers
    spans, rows = [(0, 0, 0, 20), (1, 640, 20, 21), (2, 333, 21, 32)], 32

    def tensor(values):
        return torch.tensor(values, device="cuda")

    slots = torch.randperm(39, device="cuda")[:rows]
    lengths = tensor([random.Random(i).choice([0, 1, 63, 64, 127, 128, 150, 319]) for i in range(rows)])
    prompt_lengths = tensor([0] * 20 + [640] + [333] * 11)
    query, key, value = (
        torch.randn((rows, 1, count, dim), device="cuda", dtype=dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )
    members = tile_members(heads // kv_heads)
    tiles = [*tiles_of([0] * 20 + [1] + [2] * 11, members), (0, [])]
    expected = Decode(plain, slots, prompt_lengths, lengths, spans, 320).attend(
        1, query.float(), key.float(), value.float(), 0.1, window
    )
    output = KernelDecode(
        cache=fast,
        slots=slots,
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        tile_groups=tensor([group for group, _ in tiles]),
        tile_rows=tensor([[*tile, *[-1] * (members - len(tile))] for _, tile in tiles]),
        suffix_pieces=5,
    ).attend(1, query, key, value, 0.1, window)
    error = (output - expected).float().norm() / expected.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(fast.suffix_keys.float(), plain.suffix_keys)
    assert torch.equal(fast.suffix_values.float(), plain.suffix_values)


@pytest.mark.parametrize("window", [None, 40])
def test_packed_prompts_attend_as_each_by_itself_does(window):
    """The flash kernel takes bfloat16 only; in float32 SDPA computes prompt by prompt, from the same numbers."""
    torch.manual_seed(0)
    starts = [0, 1, 40, 81, 211]  # prompts of 1, 39, 41 and 130 tokens
    spans = [(group, *starts[group : group + 2]) for group in range(4)]
    shape = CacheShape(groups=4, prompt_tokens=130, slots=1, suffix_tokens=1, layers=1, kv_heads=2, head_dim=64)
    tensors = [torch.randn((1, count, 211, 64), device="cuda", dtype=torch.bfloat16) for count in (6, 2, 2)]

    def attended(dtype):
        cache = Cache(shape, dtype=dtype, device=torch.device("cuda"))
        plan = Prefill(cache, spans, torch.tensor(starts, dtype=torch.int32, device="cuda"))
        return plan.attend(0, *(tensor.to(dtype) for tensor in tensors), 0.125, window).float()

    output, expected = attended(torch.bfloat16), attended(torch.float32)
    assert (output - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [13, 4096, 151_936])
def test_kernels_draw_as_plain_torch_does(vocabulary, temperature, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn((64, vocabulary), device="cuda", generator=generator)).to(dtype)
    logits[0, : vocabulary // 2] = -torch.inf  # whole pieces without a token
    logits[1, 5:] = -torch.inf
    state = generator.get_state()
    tokens, logprobs = draw(logits, SamplingSettings(temperature=temperature), generator=generator)
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator.set_state(state))
    expected = (logits.double() / temperature).log_softmax(-1)
    assert torch.equal(tokens, (expected - noise.double().log()).argmax(-1))
    torch.testing.assert_close(logprobs, expected.gather(1, tokens[:, None])[:, 0].float())


@pytest.mark.parametrize("vocabulary", [13, 151_936])
def test_kernels_draw_from_the_vocabulary_where_logits_are_nan(vocabulary):
    logits = torch.zeros((3, vocabulary), device="cuda")
    logits[0], logits[2, 7] = torch.nan, torch.nan
    tokens, logprobs = draw(logits, SamplingSettings(), generator=torch.Generator("cuda").manual_seed(0))
    assert tokens[0] == 0  # the first NaN, as `torch.argmax`
    assert tokens[2] == 7
    assert logprobs.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 512, 256), (33, 200, 136), (64, 8_960, 1_536)])
def test_kernel_gates_as_plain_torch_does(rows, width, depth, gelu, dtype):
    from rlvr.rollout.grouped.gated_kernel import gated_product

    torch.manual_seed(0)
    x, gate, up = (torch.randn(shape, device="cuda") for shape in ((rows, depth), (width, depth), (width, depth)))
    gate, up = gate / depth**0.5, up / depth**0.5

    def plain(x, gate, up):
        gated = x @ gate.T
        return (functional.gelu(gated, approximate="tanh") if gelu else functional.silu(gated)) * (x @ up.T)

    halves = [tensor.to(dtype) for tensor in (x, gate, up)]
    truth = plain(*(tensor.double() for tensor in halves))
    error, reference = ((y - truth).abs().max() for y in (gated_product(*halves, gelu=gelu), plain(*halves)))
    assert error <= 1.5 * reference


@pytest.mark.parametrize(("rows", "kernels"), [(64, 3), (65, 0)])
@torch.no_grad()
def test_gated_layers_of_few_rows_take_the_kernel(rows, kernels, monkeypatch):
    from rlvr.rollout.grouped import gated_kernel
    from rlvr.rollout.grouped.projections import PackedProjections, takes_gated

    model = cuda_model(dtype=torch.bfloat16)
    mlp = model.model.layers[0].mlp
    assert takes_gated(mlp)
    assert not takes_gated(cuda_model().model.layers[0].mlp)  # float32
    calls, product = [], gated_kernel.gated_product
    monkeypatch.setattr(gated_kernel, "gated_product", lambda *args, **more: calls.append(1) or product(*args, **more))
    ids = torch.randint(3, 250, (rows, 1), device="cuda")
    expected = model(ids).logits
    with PackedProjections(model).in_place():
        logits = model(ids).logits
    assert len(calls) == kernels
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    mlp.up_proj.register_forward_hook(lambda *args: None)
    assert not takes_gated(mlp)
