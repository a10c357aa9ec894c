"""The token step as one CUDA graph for each shape of batch, replayed without the host looking in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlvr.fused.layers import FusedForwards
from rlvr.rollout.grouped.attention import Plan
from rlvr.rollout.grouped.cache import CacheShape
from rlvr.rollout.grouped.kernels import PIECE, KernelDecode, tile_members, tiles_of
from rlvr.rollout.grouped.projections import PackedProjections
from rlvr.rollout.grouped.runner import Row, Runner

logger = logging.getLogger(__name__)


class BatchShape(NamedTuple):
    """What a graph is made for, each rounded up to a power of two. Which slots the rows have is data, not shape."""

    rows: int
    tiles: int
    suffix_pieces: int


class GraphRunner(Runner):
    """A `Runner` on CUDA: attention by kernels, the token step captured once for each `BatchShape`.

    Few graphs serve a whole run, and a batch that shrinks moves to a smaller one.

    Args:
        capture: False launches the same kernels one by one: the slow twin of the graphs.
        compile_layers: the decoder layers that a graph records are compiled by `torch.compile` first; where that
            fails, a warning is logged and they are recorded as they are.
    """

    def __init__(
        self,
        model: Any,
        shape: CacheShape,
        *,
        capture: bool = True,
        compile_layers: bool = False,
        **settings: Any,
    ):
        super().__init__(model, shape, **settings)
        self.capture, self.compile_layers = capture, compile_layers
        self._fused = FusedForwards(model)
        self._projections = PackedProjections(model)
        self.graphs: dict[BatchShape, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._side = torch.cuda.Stream(self.device)  # one for all graphs: memory of a pool is kept by stream
        self._members = tile_members(model.config.num_attention_heads // shape.kv_heads)
        most_tiles = power_of_two(shape.groups + shape.slots // self._members + 1)
        self._tile_groups = torch.zeros(most_tiles, dtype=torch.int64, device=self.device)
        self._tile_rows = torch.full((most_tiles, self._members), -1, dtype=torch.int64, device=self.device)
        self._size, self._tiles = 0, 0

    @staticmethod
    def row_capacity(shape: CacheShape) -> int:
        return power_of_two(shape.slots)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self._projections.load()  # the weights are those of this rollout
        super().prefill(prompts)

    def load(self, rows: Sequence[Row]) -> None:
        tiles = tiles_of([row.group for row in rows], self._members)
        self._size, self._tiles = power_of_two(len(rows)), power_of_two(len(tiles))
        self._place(rows, self._size)
        tiles += [(0, [])] * (self._tiles - len(tiles))
        members = [[*tile, *[-1] * (self._members - len(tile))] for _, tile in tiles]
        self._tile_groups[: self._tiles].copy_(torch.tensor([group for group, _ in tiles]))
        self._tile_rows[: self._tiles].copy_(torch.tensor(members))

    def _hidden(self, ids: Any, positions: Any, plan: Plan) -> Tensor:
        """Many tokens, whose activations fill the device's memory bandwidth: with fused layers."""
        self._fused.put_in()
        try:
            return super()._hidden(ids, positions, plan)
        finally:
            self._fused.take_out()

    def _run(self, steps: int) -> None:
        most = -(-self.cache.shape.suffix_tokens // PIECE)
        pieces = min(most, max(4, power_of_two(-(-(self.longest + steps) // PIECE))))
        shape = BatchShape(self._size, self._tiles, pieces)
        if not self.capture:
            plan = self._plan(shape)
            with self._projections.in_place():
                for _ in range(steps):
                    self.token_step(plan, shape.rows)
            return
        if shape not in self.graphs:
            self.graphs[shape] = self._captured(shape)
        graph = self.graphs[shape]
        for _ in range(steps):
            graph.replay()

    def _plan(self, shape: BatchShape) -> KernelDecode:
        view = self.state.view(shape.rows)
        return KernelDecode(
            cache=self.cache,
            slots=view["slot"],
            prompt_lengths=view["prompt_length"],
            lengths=view["length"],
            tile_groups=self._tile_groups[: shape.tiles],
            tile_rows=self._tile_rows[: shape.tiles],
            suffix_pieces=shape.suffix_pieces,
        )

    def _captured(self, shape: BatchShape) -> torch.cuda.CUDAGraph:
        """Captures the token step, leaving rows and random numbers as they were.

        The step has to run a few times before it can be captured (kernels are compiled, libraries set up). It runs
        with every row at its end, so that all it does is write again the key and value that the next step writes.
        """
        plan = self._plan(shape)
        rows, random_state = self.state.values.clone(), self.generator.get_state()
        graph = torch.cuda.CUDAGraph()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self.state.view(shape.rows)["done"].fill_(1)
            self._warm_up(plan, shape.rows)
            self.state.step.zero_()
            self.state.values.copy_(rows)
            self.generator.set_state(random_state)
            torch.cuda.synchronize(self.device)
            graph.register_generator_state(self.generator)
            with self._projections.in_place(), self._compiled_layers():
                self._record(graph, plan, shape.rows)
        torch.cuda.current_stream(self.device).wait_stream(self._side)
        return graph

    def _warm_up(self, plan: KernelDecode, size: int) -> None:
        """Runs the token step twice, with compiled layers if they compile, from now on without if not."""
        try:
            with self._projections.in_place(), self._compiled_layers():
                for _ in range(2):
                    self.state.step.zero_()
                    self.token_step(plan, size)
        except Exception as error:
            if not (self.compile_layers and _is_compiler_error(error)):
                raise
            first_line = next(iter(str(error).strip().splitlines()), "")
            logger.warning("torch.compile failed (%s: %s); rollouts run without it.", type(error).__name__, first_line)
            self.compile_layers = False
            self._warm_up(plan, size)

    def _record(self, graph: torch.cuda.CUDAGraph, plan: KernelDecode, size: int) -> None:
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self.token_step(plan, size)
        except BaseException:
            with suppress(RuntimeError):  # ending a spoilt capture raises too, and would hide why it was spoilt
                graph.capture_end()
            raise
        graph.capture_end()

    @contextmanager
    def _compiled_layers(self) -> Iterator[None]:
        """The decoder layers with a compiled forward, and without it again."""
        layers = list(self.decoder.layers) if self.compile_layers else []
        own = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer in layers:
                layer.forward = MethodType(_compiled_forward(type(layer)), layer)
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward


_COMPILED: dict[type, Any] = {}


def _compiled_forward(layer_type: type) -> Any:
    """One compiled function for all layers of a type, kept for the process."""
    if layer_type not in _COMPILED:
        _COMPILED[layer_type] = torch.compile(layer_type.forward)  # type: ignore[attr-defined]
    return _COMPILED[layer_type]


def _is_compiler_error(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # Inductor's errors are among them

    return isinstance(error, TorchDynamoException)


def power_of_two(value: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, value - 1).bit_length()
