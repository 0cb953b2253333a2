"""Time of one decode step of one layer, at any geometry and length, in total and by stage."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from topkbench.harness.decoding import tokenise_all
from topkbench.harness.planted import MEMORY_SHARE, PlantedCalibration, PlantedStates, capture
from topkbench.harness.reads import ReadCounter, layer_bytes_read, no_sparse_step_reason
from topkbench.harness.speed import STAGES
from topkbench.harness.task import Context, Outcome, Task, TaskRow, compact_unsupported_reason
from topkbench.kernels.timing import (
    OtherLoad,
    Stages,
    clock_mhz,
    copies_needed,
    measure,
    speed_columns,
)
from topkbench.methods.base import (
    PREFILL_NEEDS,
    PREVIOUS_QUERY,
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    Selection,
    StageTimer,
    TopKMethod,
    check_whole,
    kv_bytes,
)
from topkbench.models.capture import (
    Captured,
    LayerCall,
    watched_attention,
)
from topkbench.models.load import free_bytes
from topkbench.tasks.ruler import Ruler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILDS = 3  # timed builds of an index
T = TypeVar("T")


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
    dtype: str = "auto"
    seed: int = 0
    trials: int = 15
    cache_dir: str = "~/.cache/topkbench"
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"speed": frozenset()}
    needs_full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.all_budgets = self.budget is not None  # then k follows from the length
        self.uses_model = self.states == "captured"
        self.subject = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        if self.states not in ("planted", "captured"):
            raise ValueError(f"task.states must be planted or captured, got {self.states!r}.")
        for knob in ("num_heads", "num_kv_heads", "head_dim", "trials"):
            check_whole(f"task.{knob}", getattr(self, knob))
        if not self.shapes or min(length for length, _ in self.shapes) < 2:
            raise ValueError(
                f"task.lengths must be numbers of cached tokens of at least 2, got {self.lengths}"
                f"{f' and batch_length={self.batch_length}' if self.batch_sizes else ''}."
            )
        for size in self.batch_sizes:
            check_whole("task.batch_sizes", size)
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

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Cached tokens and batch size of each row of the report, without duplicates."""
        lengths = [(int(length), 1) for length in self.lengths]
        batches = [(int(self.batch_length), int(size)) for size in self.batch_sizes]
        return list(dict.fromkeys([*lengths, *batches]))

    def run(self, context: Context) -> Outcome:
        return Outcome([self._row(context, *s) for s in context.track(self.shapes, self.name)], [])

    def _row(self, context: Context, length: int, batch_size: int) -> TaskRow:
        name = str(length) if batch_size == 1 else f"{length} x {batch_size}"
        columns = {"kv_len": length, "length": length, "batch_size": batch_size}
        if context.method.compacts:
            return TaskRow(name, columns, "skipped", compact_unsupported_reason(self.name))
        if self.states == "captured":
            geometry = replace(context.geometry, num_layers=1)
            position = (self.layer, context.geometry.num_layers)
        else:
            geometry, position = self._planted_geometry(context), (0, 1)
        cached = batch_size * kv_bytes(geometry, length)
        index = round(batch_size * length * context.method.index_bytes_per_token(geometry))
        speculates = PREVIOUS_QUERY in context.method.needs
        width = geometry.num_heads * geometry.head_dim if speculates else 0
        copies = copies_needed(cached, geometry.device)
        # Building and checking an index takes temporary copies of the keys.
        need = copies * (cached + index + width**2 * geometry.dtype_bytes) + cached
        if need > MEMORY_SHARE * free_bytes(geometry.device):
            reason = f"{need / 2**30:.1f} GiB of states exceed half of the free memory."
            return TaskRow(name, columns, "skipped", reason)
        if self.states == "captured":
            states = self._captured(context, length)
        else:
            dtype = self._dtype(context)
            states = PlantedStates.draw(geometry, batch_size, length, dtype, self.seed)
            method = context.method
            if method.artifact_spec(geometry) is not None and not method.artifact:
                method.load_artifact(method.fit(PlantedCalibration.of(states)))
        policy, n = context.policy, states.key_states.shape[2]
        if self.budget is not None and context.method.selects:
            policy = replace(policy, k=max(64, round(n * self.budget)))
        policy = context.method.effective_policy(policy)
        if context.method.selects and policy.k >= n:
            return TaskRow(name, columns, "skipped", no_sparse_step_reason(policy.k, n))
        layer = _Layer(context.method, context.full, policy, states, position)
        values, status, reason = self._time(context, layer, geometry, copies)
        return TaskRow(name, {**columns, **values, "kv_len": n}, status, reason)

    def _time(
        self, context: Context, layer: "_Layer", geometry: Geometry, copies: int
    ) -> tuple[dict[str, Any], str, str]:
        """Return the row's values, status and reason."""
        method, n, device = context.method, layer.cache.n, layer.cache.key_states.device
        load = OtherLoad(device)
        values: dict[str, Any] = {
            "full_backend": getattr(context.full, "backend", None),
            "index_bytes_per_token": float(method.index_bytes_per_token(geometry)),
        }
        counter = ReadCounter()
        if method.selects:
            values["k"] = layer.policy.k
            mismatch = layer.mismatch()
            if mismatch is not None:
                return values, "wrong", mismatch
            states = layer.states.query_states
            counter.on_step(0, states, layer.cache, layer.step(), layer.scale, None)
            values["density"] = counter.density
            values["build_ms"] = layer.build_ms(BUILDS)
        bytes_read = layer_bytes_read(method, geometry, n, layer.policy.k, counter.step_reads)
        values["bytes_read_per_step"] = float(bytes_read)
        layers = [layer, *(layer.copy() for _ in range(copies - 1))]
        timed = measure(
            {"full": [one.full for one in layers], "method": [one.step for one in layers]},
            trials=self.trials,
            device=device,
        )
        step = timed["method"]
        warm = measure({"warm": layer.step}, trials=self.trials, device=device)["warm"]
        values["decode_ms_warm_p50"] = warm.p50_ms
        values["clock_mhz"] = clock_mhz(device)
        values["attend_ms"] = step.p50_ms  # full attention has no other stage
        if method.selects:
            medians = _stage_medians(layers, self.trials)
            values |= {f"{stage}_ms": milliseconds for stage, milliseconds in medians.items()}
        full = timed["full"].turns if method.selects else None
        values |= speed_columns(step.turns, full, load.share())
        if context.bandwidth:
            values["bandwidth_gb_s"] = context.bandwidth / 1e9
            seconds = step.p50_ms * 1e-3
            batch_bytes = bytes_read * len(layer.states.query_states)
            values["bandwidth_fraction"] = batch_bytes / seconds / context.bandwidth
        return values, "ok", ""

    def _dtype(self, context: Context) -> torch.dtype:
        model: torch.dtype = context.loaded.model.dtype
        return model if self.dtype == "auto" else DTYPES[self.dtype]

    def _planted_geometry(self, context: Context) -> Geometry:
        return Geometry(
            num_layers=1,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype_bytes=torch.empty(0, dtype=self._dtype(context)).element_size(),
            device=context.loaded.model.device,
            model_digest=f"planted-{self.seed}",
        )

    @torch.no_grad()
    def _captured(self, context: Context, length: int) -> PlantedStates:
        """Return one layer's states for a RULER prompt, whose last token is the one decoded.

        Raises:
            ValueError: If the model does not have the layer.
        """
        loaded = context.loaded
        if not 0 <= self.layer < context.geometry.num_layers:
            raise ValueError(
                f"task.layer must lie between 0 and {context.geometry.num_layers - 1}, got"
                f" {self.layer}."
            )
        task = Ruler(
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


class _Layer:
    """A method's index over given states, and a decode step that leaves the index unchanged."""

    def __init__(
        self,
        method: TopKMethod,
        full_method: TopKMethod,
        policy: Policy,
        states: PlantedStates,
        position: tuple[int, int],
        captured: Captured | None = None,
    ) -> None:
        self.method, self.full_method = method, full_method
        self.policy, self.states = policy, states
        self.position = position  # the layer's number, and the number of layers
        self.scale = states.key_states.shape[-1] ** -0.5
        self.cache = CacheView(states.key_states, states.value_states)
        self.newest = (states.key_states[:, :, -1:], states.value_states[:, :, -1:])
        needs = method.needs & PREFILL_NEEDS
        if captured is None and needs:
            prompt = self.cache.key_states[:, :, :-1]
            captured = capture(needs, prompt, states.query_states[0, ..., 0].numel(), self.scale)
        self.captured = captured or Captured(needs)
        self.projection: Tensor | None = None
        if PREVIOUS_QUERY in method.needs:
            width = states.query_states[0].numel()
            self.projection = torch.randn(width, width).to(states.query_states)
        self.index: Any = self._build() if self.method.selects else None

    def _build(self) -> Any:
        n = self.cache.n
        return self.method.build_index(
            PrefillInputs(
                key_states=self.states.key_states[:, :, : n - 1],
                value_states=self.states.value_states[:, :, : n - 1],
                capacity=n,
                layer=self.position[0],
                num_layers=self.position[1],
                scale=self.scale,
                **self.captured.inputs(n - 1),
            )
        )

    def copy(self) -> "_Layer":
        """Return a copy in new memory."""
        states = self.states.copy()
        return _Layer(
            self.method, self.full_method, self.policy, states, self.position, self.captured
        )

    def build_ms(self, trials: int) -> float:
        """Return the median milliseconds of building the index, plus those of the capture for it.

        The index has been built before, so nothing is compiled here.
        """
        stages = Stages(self.cache.key_states.device)
        for _ in range(trials):
            with stages("build"):
                self._build()
        return stages.medians()["build"] + sum(self.captured.milliseconds.values())

    def step(self, watch: StageTimer | None = None) -> Any:
        """Append the newest token, decode, and undo the append, so that all steps are the same."""
        method, index = self.method, self.index
        if self.projection is not None:
            # Only the projection's time matters: the step goes on with the real queries.
            with watch("encode") if watch else nullcontext():
                torch.mm(self.states.query_states.flatten(1), self.projection)
        if index is not None:
            with watch("append") if watch else nullcontext():
                method.append(index, *self.newest)
        result = method.step(
            self.states.query_states, index, self.cache, self.policy, self.scale, watch=watch
        )
        if index is not None:
            index.undo_append()
        return result

    def full(self) -> Any:
        """Decode with full attention."""
        query = self.states.query_states
        return self.full_method.step(query, None, self.cache, self.policy, self.scale)

    def mismatch(self) -> str | None:
        """Return a reason if a stage's result differs from the reference implementation's, or None.

        Both implementations of a stage get the same input: scores that differ in the last bit may
        break a near tie either way, and the outputs of different selections cannot be compared.
        """
        method, index = self.method, self.index
        method.append(index, *self.newest)
        try:
            if self.policy.k < self.cache.n:
                method.bind(index, self.cache)
                scores, expected = self._both(self._scores)
                if scores is not None and expected is not None:
                    error = _relative_error(scores, expected)
                    if not error <= self._tolerance:
                        return self._mismatch_reason("scores", error)
                fast, reference = self._both(lambda: self._select(expected))
                if not torch.equal(_sorted_units(fast), _sorted_units(reference)):
                    return (
                        "the selection must be the reference's for the same scores, got a"
                        " different one."
                    )
            else:
                reference = Selection.everything(self.cache)
            states = self.states.query_states
            out, expected_out = self._both(
                lambda: method.attend(states, self.cache, reference, self.scale)[0]
            )
            error = _relative_error(out, expected_out)
            return None if error <= self._tolerance else self._mismatch_reason("output", error)
        finally:
            index.undo_append()

    def _scores(self) -> Tensor | None:
        encoded = self.method.encode(self.states.query_states, self.index)
        return self.method.aggregate_over_group(
            self.method.score(encoded, self.index), self.policy, self.scale
        )

    def _select(self, scores: Tensor | None) -> Selection:
        encoded = self.method.encode(self.states.query_states, self.index)
        self.method.score(encoded, self.index)  # a method may also store results for select
        return self.method.select(scores, encoded, self.index, self.policy)

    def _both(self, stage: Callable[[], T]) -> tuple[T, T]:
        """Return a stage's result by the configured and by the reference implementation."""
        fast = stage()
        configured, self.method.impl = self.method.impl, "reference"
        try:
            return fast, stage()
        finally:
            self.method.impl = configured

    @property
    def _tolerance(self) -> float:
        return 1e-3 if self.states.key_states.dtype == torch.float32 else 4e-2

    def _mismatch_reason(self, name: str, error: float) -> str:
        return (
            f"the {name} must be the reference's within {self._tolerance}, got a difference of "
            f"{error:.3g}."
        )


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm; slots scored -inf do not count."""
    finite = ~expected.isinf()
    actual, expected = actual.float()[finite], expected.float()[finite]
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def _sorted_units(selection: Selection) -> Tensor:
    """Return the selected units in order of their slots."""
    return selection.indices.sort(-1).values


def _stage_medians(layers: Sequence[_Layer], trials: int) -> dict[str, float]:
    """Return the median milliseconds of each stage, under the same cold conditions as whole steps.

    Full attention runs before each step, as it does when whole steps are timed, since the contents
    of the caches affect a step's time.
    """
    stages = Stages(layers[0].cache.key_states.device)
    for trial in range(trials):
        layer = layers[trial % len(layers)]
        layer.full()
        layer.step(stages)
    medians = {}
    for name, times in stages.times().items():
        parts = len(times) // trials  # a stage may be timed in parts; encode has up to two
        steps = [sum(times[begin : begin + parts]) for begin in range(0, len(times), parts)]
        medians[name] = median(steps)
    return {name: milliseconds for name, milliseconds in medians.items() if name in STAGES}
