"""What one decode step of one layer costs, at any geometry and length, stages timed apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import psutil
import torch
from torch import Tensor

from topkbench.kernels.timing import Stages, measure
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    Selection,
    TopKMethod,
    check_whole,
    kv_bytes,
)
from topkbench.tasks.calibration import watched_attention
from topkbench.tasks.evaluation import (
    STAGES,
    Context,
    Outcome,
    Task,
    TaskRow,
    bytes_read,
    tokenised,
)
from topkbench.tasks.ruler import Ruler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_SHARE = 0.5
T = TypeVar("T")


@dataclass
class PlantedStates:
    """Random keys, and queries that look for a few of them: attention with something to find.

    Attributes:
        query_states: ``[B, Hkv, G, d]``.
        key_states: ``[B, Hkv, n, d]``, the newest token included.
        value_states: ``[B, Hkv, n, d]``.
    """

    query_states: Tensor
    key_states: Tensor
    value_states: Tensor

    @classmethod
    def draw(
        cls, task: "DecodeLatency", n: int, dtype: torch.dtype, device: torch.device
    ) -> "PlantedStates":
        """Plant 8 needles in every head: keys near one of the group's queries."""
        generator = torch.Generator().manual_seed(task.seed)
        group = task.num_heads // task.num_kv_heads
        shape = (task.batch_size, task.num_kv_heads)
        queries = torch.randn(*shape, group, task.head_dim, generator=generator)
        keys = torch.randn(*shape, n, task.head_dim, generator=generator)
        values = torch.randn(*shape, n, task.head_dim, generator=generator)
        needles = torch.randperm(n, generator=generator)[: min(8, n)]
        for place, slot in enumerate(needles.tolist()):
            keys[:, :, slot] += 2 * queries[:, :, place % group]
        return cls(*(states.to(device=device, dtype=dtype) for states in (queries, keys, values)))


@dataclass
class PlantedCalibration:
    """Short planted sequences for methods that must be fitted to run at all."""

    sequences: int
    drawn: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    num_layers: int = 1

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return each sequence's ``[Hq, n, d]`` queries and ``[Hkv, n, d]`` keys."""
        return self.drawn


@dataclass(kw_only=True)
class DecodeLatency(Task):
    """One decode step of one attention layer: encode, append, score, select, attend.

    Full attention and the method are timed in turn, in one process. Before a time is reported,
    the method's output is compared with its reference implementation; a wrong one has no time.

    Attributes:
        lengths: Cached tokens, one row each.
        budget: Share of the tokens that ``k`` is, at least 64 tokens; None takes the cell's ``k``.
        states: ``"planted"`` at the geometry below, or ``"captured"`` from the cell's model.
        layer: With ``"captured"``: which layer.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Channels of a head.
        batch_size: Rows.
        dtype: Of the states; ``"auto"`` is the model's.
        seed: Of the states.
        trials: Timed steps of each length.
        cache_dir: Where generated samples are kept.
    """

    name: str = "decode_latency"
    lengths: Sequence[int] = (4096, 8192, 16384, 32768, 65536, 131072)
    budget: float | None = 0.015625
    states: Literal["planted", "captured"] = "planted"
    layer: int = 0
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    batch_size: int = 1
    dtype: str = "auto"
    seed: int = 0
    trials: int = 15
    cache_dir: str = "~/.cache/topkbench"
    needs_full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.all_budgets = self.budget is not None  # k follows from the length then
        self.uses_model = self.states == "captured"
        self.subject = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        if self.states not in ("planted", "captured"):
            raise ValueError(f"task.states must be planted or captured, got {self.states!r}.")
        for knob in ("num_heads", "num_kv_heads", "head_dim", "batch_size", "trials"):
            check_whole(f"task.{knob}", getattr(self, knob))
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(
                f"task.lengths must be numbers of cached tokens from 2 on, got {self.lengths}."
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

    def run(self, context: Context) -> Outcome:
        rows = [self._row(context, n) for n in context.track(self.lengths, "decode_latency")]
        return Outcome(rows, [])

    def _row(self, context: Context, length: int) -> TaskRow:
        device = context.loaded.model.device
        if self.states == "captured":
            states = self._captured(context, length)
        else:
            need = 2 * kv_bytes(self._planted_geometry(context), length) * self.batch_size
            if need > MEMORY_SHARE * _free_bytes(device):
                reason = f"{need / 2**30:.1f} GiB of states exceed half of the free memory."
                return TaskRow(str(length), {"kv_len": length, "length": length}, "skipped", reason)
            states = PlantedStates.draw(self, length, self._dtype(context), device)
        policy = context.policy
        n = states.key_states.shape[2]
        if self.budget is not None and context.method.selects:
            policy = replace(policy, k=max(64, round(n * self.budget)))
        policy = context.method.policy_in_force(policy)
        return TaskRow(str(length), *self._time(context, policy, states, length))

    def _time(
        self, context: Context, policy: Policy, states: PlantedStates, length: int
    ) -> tuple[dict[str, Any], str, str]:
        """Return the row's values, status and reason."""
        method, n = context.method, states.key_states.shape[2]
        if self.states == "captured":
            geometry = replace(context.geometry, num_layers=1)
            place = (self.layer, context.geometry.num_layers)
        else:
            geometry, place = self._planted_geometry(context), (0, 1)
            if method.artifact_spec(geometry) is not None and not method.artifact:
                method.load_artifact(method.fit(_calibration(states)))
        scale = states.key_states.shape[-1] ** -0.5
        cache = CacheView(states.key_states, states.value_states)
        full = context.full
        values: dict[str, Any] = {
            "kv_len": n,
            "length": length,
            "batch_size": len(states.query_states),
            "full_backend": getattr(full, "backend", None),
            "index_bytes_per_token": float(method.index_bytes_per_token(geometry)),
        }
        layer = _Layer(method, policy, states, scale, place)
        tokens = policy.k if method.selects else n
        if method.selects:
            values["k"] = policy.k
            wrong = layer.disagreement()
            if wrong is not None:
                return values, "wrong", wrong
            values["density"] = _density(layer.step().selection, cache)
            if policy.head_scope == "query_head":
                tokens = round(values["density"] * n)
        read = bytes_read(method, geometry, n, tokens)
        values["bytes_read_per_step"] = float(read)

        def attend_fully() -> Any:
            return full.step(states.query_states, None, cache, policy, scale)

        timed = measure(
            {"full": attend_fully, "method": layer.step},
            trials=self.trials,
            device=states.key_states.device,
        )
        step = timed["method"]
        values["decode_ms_p20"] = step.p20_ms
        values["decode_ms_p50"] = step.p50_ms
        values["decode_ms_p80"] = step.p80_ms
        if method.selects:
            values["speedup_vs_full"] = timed["full"].p50_ms / step.p50_ms
            values["build_ms"] = layer.build_ms
            for stage, milliseconds in layer.stage_medians(self.trials, attend_fully).items():
                values[f"{stage}_ms"] = milliseconds
        else:
            values["attend_ms"] = values["decode_ms_p50"]
        if context.bandwidth:
            seconds = values["decode_ms_p50"] * 1e-3
            values["bandwidth_fraction"] = (
                read * len(states.query_states) / seconds / context.bandwidth
            )
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
        """Take one layer's states of a RULER prompt, its last token being the one decoded.

        Raises:
            ValueError: If the model has no such layer.
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
        prompt = tokenised(loaded, task.samples(loaded), "dense")[0]
        found: list[PlantedStates] = []

        def keep(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
            if layer == self.layer:
                grouped = query[:, :, -1].unflatten(1, (key.shape[1], -1))
                found.append(PlantedStates(grouped, key, value))

        with watched_attention(loaded.model, keep):
            ids = torch.tensor([prompt.prefill_ids], device=loaded.model.device)
            loaded.model.base_model(input_ids=ids, use_cache=False)
        dtype, device = self._dtype(context), loaded.model.device
        states = (found[0].query_states, found[0].key_states, found[0].value_states)
        return PlantedStates(*(one.to(device, dtype).contiguous() for one in states))


class _Layer:
    """A method's index over some states, and one decode step that leaves it as it was."""

    def __init__(
        self,
        method: TopKMethod,
        policy: Policy,
        states: PlantedStates,
        scale: float,
        place: tuple[int, int],
    ) -> None:
        self.place = place
        self.method, self.policy, self.states, self.scale = method, policy, states, scale
        self.cache = CacheView(states.key_states, states.value_states)
        self.newest = (states.key_states[:, :, -1:], states.value_states[:, :, -1:])
        self.build_ms = 0.0
        self.index: Any = None
        if method.selects:
            stages = Stages(states.key_states.device)
            self._build()  # compiles, and touches the memory first
            for _ in range(3):
                with stages("build"):
                    self.index = self._build()
            self.build_ms = stages.medians()["build"]

    def _build(self) -> Any:
        n = self.cache.n
        return self.method.build_index(
            PrefillInputs(
                key_states=self.states.key_states[:, :, : n - 1],
                value_states=self.states.value_states[:, :, : n - 1],
                capacity=n,
                layer=self.place[0],
                num_layers=self.place[1],
            )
        )

    def step(self, watch: Any = None) -> Any:
        """Append the newest token and decode; the index is set back, so each step is the same."""
        method, index = self.method, self.index
        if index is not None:
            with watch("append") if watch else _nothing():
                method.append(index, *self.newest)
        result = method.step(
            self.states.query_states, index, self.cache, self.policy, self.scale, watch=watch
        )
        if index is not None:
            index.length -= 1
        return result

    def stage_medians(self, trials: int, between: Callable[[], Any]) -> dict[str, float]:
        """Return the median milliseconds of each stage over some steps.

        ``between`` runs before each step, as it does where whole steps are timed: what it leaves in
        the caches is part of a step's cost.
        """
        stages = Stages(self.states.key_states.device)
        for _ in range(trials):
            between()
            self.step(stages)
        return {name: taken for name, taken in stages.medians().items() if name in STAGES}

    def disagreement(self) -> str | None:
        """Return one sentence if a stage's result differs from the reference implementation's.

        Each stage gets the same input in both, since a near tie may be decided either way by scores
        that differ in their last bit, and two outputs of two selections then say nothing.
        """
        method, index = self.method, self.index
        method.append(index, *self.newest)
        try:
            if self.policy.k < self.cache.n:
                method.bind(index, self.cache)
                scores, expected = self._both(self._scores)
                if scores is not None and expected is not None:
                    error = _distance(scores, expected)
                    if not error <= self._tolerance:
                        return self._sentence("scores", error)
                mine, theirs = self._both(lambda: self._select(expected))
                if not torch.equal(_kept(mine), _kept(theirs)):
                    return "the selection must be the reference's for the same scores, got another."
            else:
                theirs = Selection.everything(self.cache)
            states = self.states.query_states
            out, expected_out = self._both(
                lambda: method.attend(states, self.cache, theirs, self.scale)[0]
            )
            error = _distance(out, expected_out)
            return None if error <= self._tolerance else self._sentence("output", error)
        finally:
            index.length -= 1

    def _scores(self) -> Tensor | None:
        encoded = self.method.encode(self.states.query_states, self.index)
        return self.method.scoped(self.method.score(encoded, self.index), self.policy, self.scale)

    def _select(self, scores: Tensor | None) -> Selection:
        encoded = self.method.encode(self.states.query_states, self.index)
        return self.method.select(scores, encoded, self.index, self.policy)

    def _both(self, stage: Callable[[], T]) -> tuple[T, T]:
        """Return what a stage gives as configured, and by the reference implementation."""
        fast = stage()
        chosen, self.method.impl = self.method.impl, "reference"
        try:
            return fast, stage()
        finally:
            self.method.impl = chosen

    @property
    def _tolerance(self) -> float:
        return 1e-3 if self.states.key_states.dtype == torch.float32 else 4e-2

    def _sentence(self, what: str, error: float) -> str:
        return (
            f"the {what} must be the reference's within {self._tolerance}, got a difference of "
            f"{error:.3g}."
        )


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm; slots scored -inf do not count."""
    usable = ~expected.isinf()
    found, expected = found.float()[usable], expected.float()[usable]
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _kept(selection: Selection) -> Tensor:
    """Return the units of a selection in order of their slots."""
    return selection.indices.sort(-1).values


def _density(selection: Selection | None, cache: CacheView) -> float:
    """Return the share of the cached tokens that a step reads, 0 to 1."""
    chosen = selection or Selection.everything(cache)
    return chosen.tokens_read(cache).double().mean().item() / cache.n


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _calibration(states: PlantedStates) -> PlantedCalibration:
    """Cut short sequences out of planted states, so that a fit takes seconds.

    What is learnt is no better than chance and costs what a good one costs: the time is the same.
    """
    keys, group = states.key_states[0], states.query_states.shape[2]
    size = min(512, keys.shape[1])
    pieces = [keys[:, begin : begin + size].float() for begin in (0, keys.shape[1] - size)]
    drawn = [(piece.repeat_interleave(group, 0), piece) for piece in pieces]
    return PlantedCalibration(len(drawn), drawn)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
