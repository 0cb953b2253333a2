"""One attention layer without a model: a method's index over given states, and its decode step.

This file imports methods' contract and kernels alone, so that `topkbench.harness.bench` times every
method on a machine with torch, numba and Triton alone.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from topkbench.harness.planted import (
    MEMORY_SHARE,
    PlantedCalibration,
    PlantedStates,
    capture,
)
from topkbench.kernels.testing import WrongResult, near_tolerance, require
from topkbench.kernels.timing import (
    MemoryProbe,
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
    AnyMethod,
    CacheView,
    Geometry,
    Index,
    Policy,
    Ranking,
    ScoringMethod,
    Selection,
    StageTimer,
    StepContext,
    StepResult,
    copy_of,
    kv_bytes,
    with_impl,
)
from topkbench.methods.captured import Captured
from topkbench.methods.learning import LearningMethod

STAGES = ("encode", "append", "score", "select", "attend")
"""The stages of a decode step that have a column."""

BUILDS = 3  # timed builds of an index
BUDGET = 1 / 64
LEAST_K = 64


def budget(n: int, share: float = BUDGET) -> int:
    """Return how many of ``n`` cached tokens to select: a share, by default 1.56%; at least 64."""
    return max(LEAST_K, round(n * share))


def one_layer(num_heads: int, num_kv_heads: int, head_dim: int) -> Geometry:
    """Return the geometry of a layer of its own."""
    return Geometry(num_layers=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


def heads_label(geometry: Geometry) -> str:
    """Return a layer's heads in words, the column ``model`` of rows without a model."""
    return f"{geometry.num_heads}/{geometry.num_kv_heads} heads of {geometry.head_dim}"


def shape_label(length: int, batch_size: int) -> str:
    """Return the column ``subtask`` of a row of ``length`` cached tokens in each batch row."""
    return str(length) if batch_size == 1 else f"{length} x {batch_size}"


class Layer:
    """A method's index over given states, and a decode step that leaves the index unchanged.

    If the method speculates queries (InfiniGen), each step begins with a full query projection by
    a square matrix of random weights, without the rotation that follows.

    Args:
        method: The method, its artifact loaded, as ``resolve`` returned it.
        policy: The policy, as ``resolve`` returned it.
        states: The layer's states, the newest token included.
        layer: The layer's number in the model.
        num_layers: Layers of the model.
        captured: What was captured of the prompt; None to capture it from random queries.
    """

    def __init__(
        self,
        method: AnyMethod,
        policy: Policy,
        states: PlantedStates,
        layer: int = 0,
        num_layers: int = 1,
        captured: Captured | None = None,
    ) -> None:
        self.method, self.states = method, states
        self.context = StepContext(
            query_states=states.query_states,
            cache=CacheView(states.key_states, states.value_states),
            policy=policy,
            scale=states.key_states.shape[-1] ** -0.5,
            layer=layer,
            num_layers=num_layers,
        )
        needs = method.traits.needs & PREFILL_NEEDS
        if captured is None and needs:
            prompt = states.key_states[:, :, :-1]
            num_heads = states.query_states[0, ..., 0].numel()
            captured = capture(needs, prompt, num_heads, self.context.scale)
        self.captured = captured or Captured(needs)
        self.projection: Tensor | None = None
        if PREVIOUS_QUERY in method.traits.needs:
            width = states.query_states[0].numel()
            self.projection = torch.randn(width, width).to(states.query_states)
        self.index: Index | None = self.build() if method.selects else None

    @property
    def n(self) -> int:
        """Cached tokens, the newest included."""
        return self.context.cache.n

    def build(self) -> Index:
        """Return a new index of the tokens before the newest."""
        captured = self.captured.inputs(self.n - 1)
        index: Index = self.method.index_prompt(self.context, self.n, captured)
        return index

    def copy(self) -> "Layer":
        """Return a copy in new memory."""
        position = (self.context.layer, self.context.num_layers)
        states, policy = self.states.copy(), self.context.policy
        return Layer(self.method, policy, states, *position, self.captured)

    def reads(self, geometry: Geometry) -> tuple[int, float]:
        """Return the bytes that a step reads for one batch row, and the share of tokens it reads.

        Both are counted in a step's selection, as means over heads and rows.
        """
        method, n = self.method, self.n
        selection = self.step().selection
        if selection is None:
            return kv_bytes(geometry, n), 1.0
        read = selection.tokens_read(self.context.cache).double().mean().item()
        if self.context.policy.k >= n:
            return kv_bytes(geometry, n), read / n
        scanned = None
        if selection.scanned is not None:
            scanned = round(selection.scanned.double().mean().item())
        return method.bytes_read(geometry, n, round(read), scanned), read / n

    def build_ms(self, trials: int = BUILDS) -> float:
        """Return the median milliseconds of building the index, plus those of the capture for it.

        The index has been built before, so nothing is compiled here.
        """
        stages = Stages(self.context.cache.device)
        for _ in range(trials):
            with stages("build"):
                self.build()
        return stages.medians()["build"] + sum(self.captured.milliseconds.values())

    def step(self, watch: StageTimer | None = None) -> StepResult:
        """Append the newest token, decode, and undo the append, so that all steps are the same."""
        if self.projection is not None:
            # Only the projection's time matters: the step goes on with the real queries.
            with watch("encode") if watch else nullcontext():
                torch.mm(self.states.query_states.flatten(1), self.projection)
        if self.index is None:
            return self.method.step(None, self.context, watch)
        with watch("append") if watch else nullcontext():
            self.method.append(self.index, *self.context.cache.newest())
        result = self.method.step(self.index, self.context, watch)
        self.index.undo_append()
        return result

    def mismatch(self) -> str | None:
        """Return a reason if a stage's result differs from the reference implementation's, or None.

        Both implementations of a stage get the same input: scores that differ in the last bit may
        break a near tie either way, and the outputs of different selections cannot be compared.
        """
        assert self.index is not None  # full attention is itself what others are compared with
        self.method.append(self.index, *self.context.cache.newest())
        try:
            self._compare_stages(with_impl(self.method, "reference"))
        except WrongResult as error:
            return str(error)
        finally:
            self.index.undo_append()
        return None

    def _compare_stages(self, reference: AnyMethod) -> None:
        """Raise WrongResult if a stage of the step differs from that of the reference."""
        fast, selection = self.method, Selection.everything(self.context.cache)
        if self.context.policy.k < self.n:
            selection, ranking = self._chosen(reference)
            if ranking is not None:
                # From the query on: codes may differ in bits that are zero up to rounding.
                found = self._chosen(fast)[1]
                assert found is not None
                self._compare("scores", found.scores, ranking.scores, self._tolerance)
                self._compare_scores(ranking)
            by_fast = self._chosen(fast, ranking)[0]
            require(
                torch.equal(_sorted_units(by_fast), _sorted_units(selection)),
                "the selection must be the reference's for the same scores, got a different one.",
            )
        out, expected = (one.attend(self.context, selection)[0] for one in (fast, reference))
        self._compare("output", out, expected, near_tolerance(out.dtype))

    def _compare_scores(self, ranking: Ranking[Any]) -> None:
        """Compare the scores of the same encoded queries, whole numbers exactly."""
        fast = self.method
        if not isinstance(fast, ScoringMethod):
            return
        raw = fast.score(ranking.encoded, self.index, self.context)
        scores = fast.aggregate(raw, self.context)
        if scores.is_floating_point():
            self._compare("scores", scores, ranking.scores, near_tolerance(scores.dtype))
        else:
            same = torch.equal(scores, ranking.scores)
            require(same, "the scores must be the reference's: whole numbers differ.")

    def _chosen(
        self, method: AnyMethod, ranking: Ranking[Any] | None = None
    ) -> tuple[Selection, Ranking[Any] | None]:
        """Return what a method chooses, by the given scores if there are any.

        Choosing may change an index that depends on history, so it works on a copy of that.
        """
        index = self.index
        if method.traits.index == "history":
            index = copy.deepcopy(index)
        if ranking is not None and isinstance(method, ScoringMethod):
            return method.select(ranking, index, self.context), ranking
        chosen: tuple[Selection, Ranking[Any] | None] = method.choose(
            index, self.context, lambda stage: nullcontext(), ranking
        )
        return chosen

    @property
    def _tolerance(self) -> float:
        """Largest relative error of a step's scores, from the query on."""
        return 1e-3 if self.states.key_states.dtype == torch.float32 else 4e-2

    def _compare(self, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Raise WrongResult if the norm of the error is above the tolerance."""
        error = _relative_error(found, expected)
        require(
            error <= tolerance,  # false for NaN
            f"the {name} must be the reference's within {tolerance}, got a difference of "
            f"{error:.3g}.",
        )


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm; slots scored -inf do not count."""
    finite = ~expected.isinf()
    actual, expected = actual.float()[finite], expected.float()[finite]
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def _sorted_units(selection: Selection) -> Tensor:
    """Return the selected units in order of their slots."""
    return selection.indices.sort(-1).values


def fitted_on(method: AnyMethod, geometry: Geometry, calibration: PlantedCalibration) -> AnyMethod:
    """Return the method, or a copy fitted on planted states if it cannot run without a fit."""
    if not isinstance(method, LearningMethod) or method.artifact:
        return method
    if method.artifact_spec(geometry) is None:
        return method
    fitted = copy_of(method)
    fitted.load_artifact(fitted.fit(calibration))
    return fitted


def bytes_needed(method: AnyMethod, geometry: Geometry, batch_size: int, n: int) -> int:
    """Return the memory that timing a method's steps over ``n`` tokens takes, about."""
    cached = batch_size * kv_bytes(geometry, n)
    index = round(batch_size * n * method.index_bytes_per_token(geometry))
    speculates = PREVIOUS_QUERY in method.traits.needs
    width = geometry.num_heads * geometry.head_dim if speculates else 0
    copies = copies_needed(cached, geometry.device)
    if method.traits.index == "history":
        cached += index  # it is checked on a copy
    # Building and checking an index takes temporary copies of the keys.
    return copies * (cached + index + width**2 * geometry.dtype_bytes) + cached


def too_large_reason(need: int, free: int | None) -> str | None:
    """Return why states of ``need`` bytes are skipped, or None if there is memory for them.

    Args:
        need: What `bytes_needed` returned.
        free: Free bytes; None if unknown.
    """
    if free is None or need <= MEMORY_SHARE * free:
        return None
    return f"{need / 2**30:.1f} GiB of states exceed half of the free memory."


def differs_from_sdpa(full: AnyMethod) -> bool:
    """Return whether full attention has another kernel than SDPA, which is then timed as well."""
    return getattr(full, "backend", None) not in (None, "sdpa")


def time_layer(
    layer: Layer,
    full: AnyMethod,
    geometry: Geometry,
    trials: int,
    cuda_graph: bool = False,
    builds: int = BUILDS,
) -> tuple[dict[str, Any], str, str]:
    """Check a method's step, and time it in turn with full attention on the same states.

    If full attention has another backend than torch's SDPA, that is timed in turn as well.

    They rotate over enough copies of states and index that each step finds its data out of the CPU
    or GPU cache, as it does in a model with other layers. The warm time, the same step repeated on
    one copy, is measured as well, and the memory's bandwidth in turn with the method's step.

    Args:
        layer: The method's layer.
        full: Full attention.
        geometry: Its shape.
        trials: Timed steps.
        cuda_graph: Time replays of a CUDA graph; stages are timed launch by launch nevertheless.
        builds: Timed builds of the index; 0 if what it is built from was not captured but drawn,
            so that its time is not known.

    Returns:
        The row's values, status and reason. If the step is wrong, nothing is timed.
    """
    method, policy, n = layer.method, layer.context.policy, layer.n
    device = layer.context.cache.device
    load = OtherLoad(device)
    values: dict[str, Any] = {
        "full_backend": getattr(full, "backend", None),
        "index_bytes_per_token": float(method.index_bytes_per_token(geometry)),
    }
    if method.selects:
        values["k"] = policy.k
        mismatch = layer.mismatch()
        if mismatch is not None:
            return values, "wrong", mismatch
    bytes_read, density = layer.reads(geometry)
    if method.selects:
        values["density"] = density
        if builds:
            values["build_ms"] = layer.build_ms(builds)
    values["bytes_read_per_step"] = float(bytes_read)
    copies = copies_needed(len(layer.states.key_states) * kv_bytes(geometry, n), device)
    if copies > 1:
        copies = max(copies, 3)  # one for each that is timed
    layers = [layer, *(layer.copy() for _ in range(copies - 1))]
    dense = [Layer(full, policy, one.states) for one in layers]
    steps = {"full": [one.step for one in dense], "method": [one.step for one in layers]}
    if differs_from_sdpa(full):
        by_sdpa = [Layer(type(full)(), policy, one.states) for one in layers]
        steps = {"sdpa": [one.step for one in by_sdpa], **steps}
    # Each begins at another copy, or one would find in the cache what the one before has read.
    for place, name in enumerate(steps):
        first = place * copies // 3
        steps[name] = steps[name][first:] + steps[name][:first]
    timed = measure(steps, trials=trials, device=device, cuda_graph=cuda_graph)
    step = timed["method"]
    warm = measure({"warm": layer.step}, trials=trials, device=device, cuda_graph=cuda_graph)
    values["decode_ms_warm_p50"] = warm["warm"].p50_ms
    values["clock_mhz"] = clock_mhz(device)
    values["attend_ms"] = step.p50_ms  # full attention has no other stage
    if method.selects:
        medians = _stage_medians(layers, dense, trials)
        values |= {f"{stage}_ms": milliseconds for stage, milliseconds in medians.items()}
    turns = timed["full"].turns if method.selects else None
    sdpa = timed["sdpa"].turns if "sdpa" in timed else None
    values |= speed_columns(step.turns, turns, load.share(), sdpa)
    probe = MemoryProbe(device)
    # Full attention stands before the method as above: torch's threads, which copy the memory, keep
    # their processors busy for some time after they are done.
    in_turn = measure(
        {**probe.calls, **{name: steps[name] for name in ("full", "method")}},
        trials=trials,
        device=device,
        cuda_graph=cuda_graph,
    )
    bandwidth = probe.bandwidth(in_turn).ceiling_gb_s
    read_gb = bytes_read * len(layer.states.query_states) / 1e9
    values["bandwidth_gb_s"] = bandwidth
    values["bandwidth_fraction"] = read_gb / (in_turn["method"].p50_ms * 1e-3) / bandwidth
    return values, "ok", ""


def _stage_medians(
    layers: Sequence[Layer], dense: Sequence[Layer], trials: int
) -> dict[str, float]:
    """Return the median milliseconds of each stage, under the same cold conditions as whole steps.

    Full attention runs before each step on another copy, as it does when whole steps are timed,
    since the contents of the caches affect a step's time.
    """
    stages = Stages(layers[0].context.cache.device)
    for trial in range(trials):
        place = trial % len(layers)
        dense[place - len(dense) // 3].step()
        layers[place].step(stages)
    medians = {}
    for name, times in stages.times().items():
        parts = len(times) // trials  # a stage may be timed in parts
        steps = [sum(times[begin : begin + parts]) for begin in range(0, len(times), parts)]
        medians[name] = median(steps)
    return {name: milliseconds for name, milliseconds in medians.items() if name in STAGES}
