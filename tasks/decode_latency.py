"""Time of one decode step of one layer, at any geometry and length, in total and by stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from topkbench.harness.decoding import tokenise_all
from topkbench.harness.layer import (
    Layer,
    budget,
    bytes_needed,
    fitted_on,
    heads_label,
    one_layer,
    shape_label,
    time_layer,
    too_large_reason,
)
from topkbench.harness.planted import (
    CALIBRATION_TOKENS,
    DTYPES,
    PlantedCalibration,
    PlantedStates,
)
from topkbench.harness.reads import no_sparse_step_reason
from topkbench.harness.task import (
    Context,
    Outcome,
    Task,
    TaskRow,
    compact_unsupported_reason,
    pilot_sizes,
)
from topkbench.methods.base import AnyMethod, Geometry, Policy, check_list, check_whole
from topkbench.models.load import Dtype, ModelNotAvailable, ModelShape, free_bytes, needs_text
from topkbench.models.watch import LayerCall, watched_attention
from topkbench.tasks.ruler_words import RulerWords


@dataclass(kw_only=True)
class DecodeLatency(Task):
    """One decode step of one attention layer: encode, append, score, select, attend.

    Full attention and the method are timed in turn, in one process. They rotate over enough copies
    of states and index that each step finds its data out of the CPU or GPU cache, as it does in a
    model with other layers. The method's warm time, the same step repeated on one copy, is reported
    as well. Before timing, the method's result is compared with its reference implementation; if it
    is wrong, no time is reported.

    The time includes what a method needs beyond keys and values. What it captures at prefill is
    captured from random queries, at all positions if it sums over them, and counts as build time.
    If it speculates queries (InfiniGen), each step begins with a full query projection by a square
    matrix of random weights, without the rotation that follows. The bytes charged are those of the
    rows that the method's paper computes, so the bandwidth fraction is too low rather than too
    high.

    Attributes:
        lengths: Cached tokens; one row of the report each, with batch size 1.
        batch_sizes: Batch sizes; one row of the report each, at ``batch_length``.
        batch_length: Cached tokens for the rows of ``batch_sizes``.
        budget: ``k`` as a share of the cached tokens, at least 64 tokens; None uses the cell's
            ``k``.
        states: ``"planted"`` at the geometry below, or ``"captured"`` from the cell's model.
        layer: The layer to capture with ``states="captured"``.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Channels of a head.
        dtype: Dtype of the states; ``"auto"`` is the model's.
        seed: Seed of the states.
        trials: Timed steps per row.
        cache_dir: Folder in which generated samples are cached.
    """

    name: str = "decode_latency"
    lengths: Sequence[int] = (4096, 8192, 16384, 32768, 65536, 131072)
    batch_sizes: Sequence[int] = ()
    batch_length: int = 32768
    budget: float | None = 0.015625
    states: Literal["planted", "captured"] = "planted"
    layer: int = 0
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: Dtype = "auto"
    seed: int = 0
    trials: int = 15
    cache_dir: str = "~/.cache/topkbench"
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"speed": frozenset()}
    needs_full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.all_budgets = self.budget is not None  # then k follows from the length
        self.uses_model = self.states == "captured"
        if self.states not in ("planted", "captured"):
            raise ValueError(f"task.states must be planted or captured, got {self.states!r}.")
        for knob in ("num_heads", "num_kv_heads", "head_dim", "trials"):
            check_whole(f"task.{knob}", getattr(self, knob))
        for knob in ("layer", "seed"):
            check_whole(knob, getattr(self, knob), least=0)
        check_whole("task.batch_length", self.batch_length, least=2)
        if self.batch_sizes:
            check_list("task.batch_sizes", self.batch_sizes, least=1)
        if self.lengths or not self.batch_sizes:
            check_list("task.lengths", self.lengths, least=2)
        for size in self.batch_sizes:
            if size > 1 and self.states == "captured":
                raise ValueError(
                    f"task.batch_sizes must be [] or [1] with states=captured, got {size}; states"
                    " are captured from one prompt."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"task.num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, got"
                f" {self.num_heads}."
            )
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(
                f"task.dtype must be auto or one of {', '.join(DTYPES)}, got {self.dtype!r}."
            )
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"task.budget must be a share above 0 and up to 1, got {self.budget}.")
        self.subject = heads_label(self._heads)

    def attention(self, model: Geometry | None) -> Geometry | None:
        return model if self.uses_model else self._heads

    def check_model(self, shape: ModelShape) -> None:
        if self.states != "captured":
            return
        if not shape.has_tokenizer:
            raise ModelNotAvailable(needs_text(shape.name))
        self._check_layer(shape.num_layers)

    def _check_layer(self, num_layers: int) -> None:
        if self.layer >= num_layers:
            raise ValueError(
                f"task.layer must lie between 0 and {num_layers - 1}, got {self.layer}."
            )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Cached tokens and batch size of each row of the report, without duplicates."""
        lengths = [(length, 1) for length in self.lengths]
        batches = [(self.batch_length, size) for size in self.batch_sizes]
        return list(dict.fromkeys([*lengths, *batches]))

    def run(self, context: Context) -> Outcome:
        context = self.fitted(context)
        return Outcome([self._row(context, *s) for s in context.track(self.shapes, self.name)], [])

    def fitted(self, context: Context) -> Context:
        if self.states == "captured":
            return context
        geometry = self._planted_geometry(context)
        drawn = (1, 2 * CALIBRATION_TOKENS, self._dtype(context), self.seed)
        calibration = PlantedCalibration.of(PlantedStates.draw(geometry, *drawn))
        return replace(context, method=fitted_on(context.method, geometry, calibration))

    def known_rows(self, context: Context) -> list[TaskRow]:
        rows = [self._skipped(context, *shape) for shape in self.shapes]
        return [row for row in rows if row is not None]

    def bytes_needed(self, context: Context) -> int:
        geometry = self._geometry(context)
        needs = (bytes_needed(context.method, geometry, size, n) for n, size in self._run(context))
        return max(needs, default=0)

    def pilots(self, context: Context) -> list[tuple[Task, float]]:
        shapes = self._run(context)
        return [
            (replace(self, lengths=[], batch_length=shapes[at][0], batch_sizes=[shapes[at][1]]), by)
            for at, by in pilot_sizes([length * size for length, size in shapes])
        ]

    def _run(self, context: Context) -> list[tuple[int, int]]:
        """Return the shapes that are not skipped, as far as that is known before."""
        return [shape for shape in self.shapes if self._skipped(context, *shape) is None]

    def _geometry(self, context: Context) -> Geometry:
        """Return the geometry of the layer that is timed."""
        if self.states == "captured":
            return replace(context.geometry, num_layers=1)
        return self._planted_geometry(context)

    def _skipped(self, context: Context, length: int, batch_size: int) -> TaskRow | None:
        """Return the row of a shape that is skipped before anything is drawn, else None."""
        name = shape_label(length, batch_size)
        columns: dict[str, Any] = {"kv_len": length, "length": length, "batch_size": batch_size}
        if context.method.compacts:
            return TaskRow(name, columns, "skipped", compact_unsupported_reason(self.name))
        geometry = self._geometry(context)
        need = bytes_needed(context.method, geometry, batch_size, length)
        reason = too_large_reason(need, free_bytes(geometry.device))
        if reason is not None:
            columns["memory_needed_mib"] = need / 2**20
            return TaskRow(name, columns, "skipped", reason)
        if self.states == "planted":  # a captured prompt may be a little shorter
            return self._skipped_dense(context, length, name, columns)
        return None

    def _skipped_dense(
        self, context: Context, n: int, name: str, columns: dict[str, Any]
    ) -> TaskRow | None:
        """Return the row of a step over ``n`` tokens that are no more than ``k``, else None."""
        k = self._acting(context, n)[1].k
        if not context.method.selects or k < n:
            return None
        return TaskRow(name, columns, "skipped", no_sparse_step_reason(k, n))

    def _acting(self, context: Context, n: int) -> tuple[AnyMethod, Policy]:
        """Return the method and the policy as they act together over ``n`` tokens."""
        is_share = self.budget is not None and context.method.selects
        return context.resolved(budget(n, self.budget or 0.0) if is_share else None)

    def _row(self, context: Context, length: int, batch_size: int) -> TaskRow:
        skipped = self._skipped(context, length, batch_size)
        if skipped is not None:
            return skipped
        name = shape_label(length, batch_size)
        columns: dict[str, Any] = {"kv_len": length, "length": length, "batch_size": batch_size}
        geometry, position = self._geometry(context), (0, 1)
        if self.states == "captured":
            position = (self.layer, context.geometry.num_layers)
            states = self.captured_states(context, length)
        else:
            dtype = self._dtype(context)
            states = PlantedStates.draw(geometry, batch_size, length, dtype, self.seed)
        n = states.key_states.shape[2]
        skipped = self._skipped_dense(context, n, name, columns)
        if skipped is not None:
            return skipped
        method, policy = self._acting(context, n)
        layer = Layer(method, policy, states, *position)
        values, status, reason = time_layer(layer, context.full, geometry, self.trials)
        return TaskRow(name, {**columns, **values, "kv_len": n}, status, reason)

    def _dtype(self, context: Context) -> torch.dtype:
        model: torch.dtype = context.loaded.model.dtype
        return model if self.dtype == "auto" else DTYPES[self.dtype]

    @property
    def _heads(self) -> Geometry:
        return one_layer(self.num_heads, self.num_kv_heads, self.head_dim)

    def _planted_geometry(self, context: Context) -> Geometry:
        return replace(
            self._heads,
            dtype_bytes=self._dtype(context).itemsize,
            device=context.loaded.model.device,
            model_digest=f"planted-{self.seed}",
        )

    @torch.no_grad()
    def captured_states(self, context: Context, length: int) -> PlantedStates:
        """Return one layer's states for a RULER prompt, whose last token is the one decoded.

        Raises:
            ValueError: If the model does not have the layer.
        """
        loaded = context.loaded
        self._check_layer(context.geometry.num_layers)
        task = RulerWords(
            length=length,
            num_samples=1,
            subtasks=("niah_multikey",),
            seed=self.seed,
            cache_dir=self.cache_dir,
        )
        prompt = tokenise_all(loaded, task.samples(loaded), "dense")[0]
        captured: list[PlantedStates] = []

        def keep(call: LayerCall) -> None:
            if call.layer == self.layer:
                key = call.key_states
                grouped = call.query_states[:, :, -1].unflatten(1, (key.shape[1], -1))
                captured.append(PlantedStates(grouped, key, call.value_states))

        with watched_attention(loaded.model, keep):
            ids = torch.tensor([prompt.prefill_ids], device=loaded.model.device)
            loaded.model.base_model(input_ids=ids, use_cache=False)
        dtype, device = self._dtype(context), loaded.model.device
        first = captured[0]
        states = (first.query_states, first.key_states, first.value_states)
        return PlantedStates(*(one.to(device, dtype).contiguous() for one in states))
