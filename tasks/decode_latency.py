"""What one decode step of one layer costs, at any geometry and length, stages timed apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import psutil
import torch
from torch import Tensor

from topkbench.kernels.timing import Stages, measure
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    TopKMethod,
    kv_bytes,
)
from topkbench.models.load import LoadedModel
from topkbench.tasks.evaluation import STAGES, Context, Outcome, Task, TaskRow, tokenised
from topkbench.tasks.ruler import Ruler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_SHARE = 0.5


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
    def draw(cls, task: "DecodeLatency", n: int, device: torch.device) -> "PlantedStates":
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
        dtype = DTYPES[task.dtype]
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
    needs_full: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.all_budgets = self.budget is not None  # k follows from the length then
        if self.states not in ("planted", "captured"):
            raise ValueError(f"task.states must be planted or captured, got {self.states!r}.")
        for knob in ("num_heads", "num_kv_heads", "head_dim", "batch_size", "trials"):
            if getattr(self, knob) < 1:
                raise ValueError(f"task.{knob} must be at least 1, got {getattr(self, knob)}.")
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
        rows = [
            self._row(context, n, states)
            for n, states in context.track(list(self._sources(context)), "decode_latency")
        ]
        return Outcome(rows, [])

    def _sources(self, context: Context) -> Iterator[tuple[int, PlantedStates | None]]:
        if self.states == "planted":
            yield from ((n, None) for n in self.lengths)
            return
        for n in self.lengths:
            yield n, self._captured(context, n)

    def _row(self, context: Context, n: int, states: PlantedStates | None) -> TaskRow:
        device = context.loaded.model.device
        if states is None:
            need = 2 * kv_bytes(self._geometry(context.loaded), n) * self.batch_size
            if need > MEMORY_SHARE * _free_bytes(device):
                reason = f"{need / 2**30:.1f} GiB of states exceed half of the free memory."
                return TaskRow(str(n), {"kv_len": n}, "skipped", reason)
            states = PlantedStates.draw(self, n, device)
        policy = context.policy
        if self.budget is not None and context.method.selects:
            policy = replace(policy, k=max(64, round(n * self.budget)))
        method = context.method
        policy = method.policy_in_force(policy)
        return self._time(context, method, policy, states, n)

    def _time(
        self, context: Context, method: TopKMethod, policy: Policy, states: PlantedStates, n: int
    ) -> TaskRow:
        geometry = self._geometry(context.loaded, states)
        if method.selects and method.artifact_spec(geometry) is not None and not method.artifact:
            method.load_artifact(method.fit(_calibration(self, states)))
        scale = states.key_states.shape[-1] ** -0.5
        cache = CacheView(states.key_states, states.value_states)
        full = context.full
        values: dict[str, Any] = {
            "kv_len": n,
            "length": n,
            "batch_size": len(states.query_states),
            "full_backend": getattr(full, "backend", None),
            "index_bytes_per_token": float(method.index_bytes_per_token(geometry)),
        }
        layer = _Layer(method, policy, states, scale)
        read = method.bytes_read_per_step(geometry, n, policy.k if method.selects else n)
        values["bytes_read_per_step"] = float(read) * len(states.query_states)
        if method.selects:
            values["k"] = policy.k
            wrong = layer.disagreement()
            if wrong is not None:
                return TaskRow(str(n), values, "wrong", wrong)
            values["density"] = method.tokens_read(layer.step().selection, n) / n
        timed = measure(
            {
                "full": lambda: full.step(states.query_states, None, cache, policy, scale),
                "method": layer.step,
            },
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
            for stage, milliseconds in layer.stage_medians(self.trials).items():
                values[f"{stage}_ms"] = milliseconds
        else:
            values["attend_ms"] = values["decode_ms_p50"]
        if context.bandwidth:
            seconds = values["decode_ms_p50"] * 1e-3
            values["bandwidth_fraction"] = (
                values["bytes_read_per_step"] / seconds / context.bandwidth
            )
        return TaskRow(str(n), values)

    def _geometry(self, loaded: LoadedModel, states: PlantedStates | None = None) -> Geometry:
        kv_heads, group, head_dim = (
            self.num_kv_heads,
            self.num_heads // self.num_kv_heads,
            (self.head_dim),
        )
        if states is not None:
            _, kv_heads, group, head_dim = states.query_states.shape
        return Geometry(
            num_layers=1,
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype_bytes=torch.empty(0, dtype=DTYPES[self.dtype]).element_size(),
            device=loaded.model.device,
            model_digest=f"planted-{self.seed}",
        )

    def _captured(self, context: Context, n: int) -> PlantedStates:
        """Take keys and values from a RULER prompt's prefill; the last keys stand in as queries."""
        loaded = context.loaded
        task = Ruler(length=n, num_samples=1, subtasks=("niah_multikey",), seed=self.seed)
        prompt = tokenised(loaded, task.samples(loaded), "dense")[0]
        states = context.store.get(prompt.prefill_ids)
        dtype = DTYPES[self.dtype]
        keys = states.key_states[self.layer][None].to(dtype)
        values = states.value_states[self.layer][None].to(dtype)
        geometry = context.geometry
        group = geometry.num_heads // geometry.num_kv_heads
        queries = keys[:, :, -1:].expand(-1, -1, group, -1).contiguous()
        return PlantedStates(queries, keys, values)


class _Layer:
    """A method's index over some states, and one decode step that leaves it as it was."""

    def __init__(
        self, method: TopKMethod, policy: Policy, states: PlantedStates, scale: float
    ) -> None:
        self.method, self.policy, self.states, self.scale = method, policy, states, scale
        self.cache = CacheView(states.key_states, states.value_states)
        self.newest = (states.key_states[:, :, -1:], states.value_states[:, :, -1:])
        self.build_ms = 0.0
        self.index: Any = None
        if method.selects:
            stages = Stages(states.key_states.device)
            with stages("build"):
                self.index = self._build()
            self.build_ms = stages.times()["build"][0]

    def _build(self) -> Any:
        n = self.cache.n
        return self.method.build_index(
            PrefillInputs(
                key_states=self.states.key_states[:, :, : n - 1],
                value_states=self.states.value_states[:, :, : n - 1],
                capacity=n,
                layer=0,
                num_layers=1,
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

    def stage_medians(self, trials: int) -> dict[str, float]:
        """Return the median milliseconds of each stage over some steps."""
        stages = Stages(self.states.key_states.device)
        for _ in range(trials):
            self.step(stages)
        return {name: taken for name, taken in stages.medians().items() if name in STAGES}

    def disagreement(self) -> str | None:
        """Return one sentence if the output differs from the reference implementation's."""
        fast = self.step().out.float()
        chosen, self.method.impl = self.method.impl, "reference"
        try:
            slow = self.step().out.float()
        finally:
            self.method.impl = chosen
        tolerance = 4e-2 if self.states.key_states.dtype == torch.bfloat16 else 1e-3
        error = (fast - slow).norm() / slow.norm()
        if error <= tolerance:
            return None
        return (
            f"the output must be the reference's within {tolerance}, got a difference of {error}."
        )


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _calibration(task: DecodeLatency, states: PlantedStates) -> PlantedCalibration:
    """Cut short sequences out of the states, so that a fit takes seconds."""
    keys, group = states.key_states[0], states.query_states.shape[2]
    size = min(512, keys.shape[1])
    pieces = [keys[:, begin : begin + size].float() for begin in (0, keys.shape[1] - size)]
    drawn = [(piece.repeat_interleave(group, 0), piece) for piece in pieces]
    return PlantedCalibration(len(drawn), drawn)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
