"""Tokens per second that a whole model decodes, at any context length."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from topkbench.harness.cell import peak_memory_mib, reset_peak_memory
from topkbench.harness.decoding import NotFiniteError
from topkbench.harness.layer import budget, differs_from_sdpa, fitted_on
from topkbench.harness.planted import MEMORY_SHARE, PlantedCalibration, capture
from topkbench.harness.reads import (
    ReadCounter,
    accounting,
    density_of_all_layers,
    no_sparse_step_reason,
)
from topkbench.harness.task import (
    Context,
    Outcome,
    Task,
    TaskRow,
    compact_unsupported_reason,
    pilot_sizes,
)
from topkbench.kernels.timing import OtherLoad, Stages, measure, speed_columns
from topkbench.methods.base import (
    PREFILL_NEEDS,
    AnyMethod,
    Geometry,
    Policy,
    cache_bytes,
    check_list,
    check_whole,
)
from topkbench.models.attach import Session, attach
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import PreTrainedModel, layer_devices, token_logits
from topkbench.models.load import free_bytes
from topkbench.models.prefill import prefill

CALIBRATION_TOKENS = 128


@dataclass(kw_only=True)
class DecodeThroughput(Task):
    """Decode steps of the cell's whole model, over a random cache of any length.

    Full attention and the method decode in turn, in one process, over one cache that is allocated
    once. Each step decodes the same token at the same position and is then undone, so that all
    steps cost the same. The cache holds random keys and values, the same in every layer, since
    prefilling such contexts takes hours on a CPU. The method builds its index from them, and a
    method that learns is fitted on random keys: it selects no better than chance, in the same time.

    Before timing, the logits must be finite, and with ``k`` equal to the cache length they must
    match full attention's.

    Attributes:
        lengths: Cached tokens, including the decoded one; one row each.
        budget: ``k`` as a share of the cached tokens, at least 64 tokens; None uses the cell's
            ``k``.
        batch_size: Rows that decode together.
        seed: Seed of the random states.
        trials: Timed steps per length.
        cuda_graph: On a GPU, time the replay of a CUDA graph; if a step cannot be captured, its row
            is skipped.
    """

    name: str = "decode_throughput"
    lengths: Sequence[int] = (4096, 8192, 16384, 32768, 65536)
    budget: float | None = 0.015625
    batch_size: int = 1
    seed: int = 0
    trials: int = 15
    cuda_graph: bool = True
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"speed": frozenset()}
    needs_full: ClassVar[bool] = False
    fits_methods: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.all_budgets = self.budget is not None  # then k follows from the length
        for knob in ("batch_size", "trials"):
            check_whole(f"task.{knob}", getattr(self, knob))
        check_whole("seed", self.seed, least=0)
        check_list("task.lengths", self.lengths, least=2)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"task.budget must be a share above 0 and up to 1, got {self.budget}.")

    def run(self, context: Context) -> Outcome:
        context = self.fitted(context)
        rows = [self._row(context, n) for n in context.track(self.lengths, self.name)]
        return Outcome(rows, [])

    def fitted(self, context: Context) -> Context:
        keys = random_keys(context.geometry)
        return replace(context, method=fitted_on(context.method, context.geometry, keys))

    def known_rows(self, context: Context) -> list[TaskRow]:
        rows = [self._skipped(context, length) for length in self.lengths]
        return [row for row in rows if row is not None]

    def bytes_needed(self, context: Context) -> int:
        return max((round(self._bytes_needed(context, n)) for n in self._run(context)), default=0)

    def pilots(self, context: Context) -> list[tuple[Task, float]]:
        lengths = self._run(context)
        return [(replace(self, lengths=[lengths[at]]), by) for at, by in pilot_sizes(lengths)]

    def _run(self, context: Context) -> list[int]:
        """Return the lengths that are not skipped, as far as that is known before."""
        return [length for length in self.lengths if self._skipped(context, length) is None]

    def _skipped(self, context: Context, length: int) -> TaskRow | None:
        """Return the row of a length that is skipped, else None."""
        values: dict[str, Any] = {"kv_len": length, "length": length, "batch_size": self.batch_size}
        if context.method.compacts:
            reason = compact_unsupported_reason(self.name)
            return TaskRow(str(length), values, "skipped", reason)
        if length > context.loaded.window:
            reason = (
                f"{length} tokens exceed the window of {context.loaded.window} tokens of"
                f" {context.loaded.name}."
            )
            return TaskRow(str(length), values, "skipped", reason)
        need, device = self._bytes_needed(context, length), context.loaded.model.device
        if device.type == "cuda":
            torch.cuda.empty_cache()  # counts memory that earlier lengths freed as free
        weights = context.loaded.model.get_memory_footprint()
        if need > MEMORY_SHARE * (free_bytes(device) + weights):
            reason = f"{need / 2**30:.1f} GiB of weights and caches exceed half of the free memory."
            values["memory_needed_mib"] = need / 2**20
            return TaskRow(str(length), values, "skipped", reason)
        k = self._acting(context, length)[1].k
        if context.method.selects and k >= length:
            return TaskRow(str(length), values, "skipped", no_sparse_step_reason(k, length))
        return None

    def _acting(self, context: Context, length: int) -> tuple[AnyMethod, Policy]:
        """Return the method and the policy as they act together over ``length`` tokens."""
        is_share = self.budget is not None and context.method.selects
        return context.resolved(budget(length, self.budget or 0.0) if is_share else None)

    def _row(self, context: Context, length: int) -> TaskRow:
        skipped = self._skipped(context, length)
        if skipped is not None:
            return skipped
        values: dict[str, Any] = {"kv_len": length, "length": length, "batch_size": self.batch_size}
        method, policy = self._acting(context, length)
        device = context.loaded.model.device
        reset_peak_memory(device)
        context = replace(context, method=method, policy=policy)
        try:
            timed, status, reason = self._time(context, length)
        except NotFiniteError as error:
            timed, status, reason = {}, "failed", str(error)
        values |= {**timed, "peak_memory_mib": peak_memory_mib(device)}
        return TaskRow(str(length), values, status, reason)

    def _bytes_needed(self, context: Context, length: int) -> float:
        """Return the bytes of the weights, and of the cache and the index of ``length`` tokens."""
        geometry = context.geometry
        index = len(geometry.global_layers) * context.method.index_bytes_per_token(geometry)
        weights = context.loaded.model.get_memory_footprint()
        return weights + self.batch_size * length * (cache_bytes(geometry, 1) + index)

    @torch.inference_mode()
    def _time(self, context: Context, length: int) -> tuple[dict[str, Any], str, str]:
        """Return the values (besides the length), the status and the reason of one length's row."""
        model, method, policy = context.loaded.model, context.method, context.policy
        load = OtherLoad(model.device)
        cache, needs_ms = self.random_cache(context, length)
        values: dict[str, Any] = {"full_backend": getattr(context.full, "backend", None)}
        if method.selects:
            values["k"] = policy.k
        counts, build_ms = self._count_reads(context, cache)
        values |= counts
        twin = sharing_weights(model)
        if method.selects:
            difference = mismatch(context, twin, cache, length)
            if difference is not None:
                return values, "wrong", difference
        # Models are copied before a method is attached, which cannot be copied.
        timed_on = {"step": (model, method)}
        if method.selects:
            timed_on = {"full": (twin, context.full), **timed_on}
        if differs_from_sdpa(context.full):
            timed_on = {"sdpa": (sharing_weights(model), context.answering_full), **timed_on}
        with ExitStack() as attached:
            turns: dict[str, Callable[[], Tensor]] = {}
            for name, (one, acting) in timed_on.items():
                session = attached.enter_context(attach(one, acting, policy))
                turns[name] = partial(step, one, session, cache)
            graph = self._graph(model.device)
            try:
                timed = measure(turns, self.trials, 2, model.device, cuda_graph=graph)
            except RuntimeError as error:
                if not graph or isinstance(error, torch.OutOfMemoryError):
                    raise
                message = " ".join(str(error).split())[:200]
                reason = (
                    f"the step must record into a CUDA graph, got {message};"
                    " task.cuda_graph=false times it kernel by kernel."
                )
                return values, "skipped", reason
        step_timing = timed["step"]
        full = timed["full"].turns if method.selects else None
        sdpa = timed["sdpa"].turns if "sdpa" in timed else None
        values |= speed_columns(step_timing.turns, full, load.share(), sdpa)
        values["tokens_per_s"] = 1e3 * self.batch_size / step_timing.p50_ms
        if method.selects:
            values["build_ms"] = build_ms + needs_ms
        return values, "ok", ""

    def _graph(self, device: torch.device) -> bool:
        """Return whether steps are replayed from a CUDA graph."""
        return self.cuda_graph and device.type == "cuda"

    def random_cache(self, context: Context, length: int) -> tuple[DecodeCache, float]:
        """Return a cache of random states, and the milliseconds of capturing what the method needs.

        The cache's last slot is free for the token to decode. The capture is measured on one
        layer of one prompt and counted for all layers and prompts.
        """
        geometry, model = context.geometry, context.loaded.model
        generator = torch.Generator(model.device).manual_seed(self.seed)

        @functools.cache
        def drawn(num_heads: int, width: int, name: str) -> Tensor:
            shape = (num_heads, length - 1, width)
            return torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device)

        # Of the shapes that the model caches, which may be latent vectors, not keys and values.
        # Layers without attention keep what they have after one token.
        token = prefill(model, [0])
        keys, values = (
            [drawn(len(one), one.shape[2], name) for one in getattr(token, name)]
            for name in ("key_states", "value_states")
        )
        prompt = replace(token, key_states=keys, value_states=values)
        needs = context.method.traits.needs & PREFILL_NEEDS
        if needs:
            attended = drawn(geometry.num_kv_heads, geometry.head_dim, "attended")[None]
            captured = capture(needs, attended, geometry.num_heads, geometry.head_dim**-0.5)
            of_layers = dict.fromkeys(geometry.global_layers, captured)
            prompt = replace(prompt, captured=of_layers)
        cache = DecodeCache.on(layer_devices(model), [prompt] * self.batch_size, 1)
        cache.extend()
        return cache, self.batch_size * prompt.needs_ms(needs)

    def _count_reads(self, context: Context, cache: DecodeCache) -> tuple[dict[str, Any], float]:
        """Return the columns of what an untimed step reads, and the index's build milliseconds.

        Raises:
            MethodBypassedError: If the step did not go through the method in each of its layers.
            NotFiniteError: If the logits are not finite.
        """
        model, method, policy = context.loaded.model, context.method, context.policy
        with attach(model, method, policy) as session:
            step(model, session, cache)  # compiles
        observer = TimedReadCounter(model.device)
        with attach(model, method, policy, observer) as session:
            logits = step(model, session, cache)
            session.require_steps(self.batch_size)
        if not logits.isfinite().all():
            raise NotFiniteError("the logits must be finite, got infinity or NaN.")
        columns = accounting(context, cache.n, observer.count.step_reads)
        columns |= {"density": observer.count.density}
        columns["density_all"] = density_of_all_layers(context, cache.n, observer.count.density)
        if session.method.selects:
            columns["sparse_step_share"] = session.count.share_taken
        return columns, sum(observer.stages.times().get("build", ()))


class TimedReadCounter(ReadCounter):
    """Counts what a step reads and times its stages."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.stages = Stages(device)

    def stage(self, name: str, layer: int) -> Any:
        return self.stages(name)


def step(model: PreTrainedModel, session: Session, cache: DecodeCache) -> Tensor:
    """Decode token 0 in each row, undo the step, and return the logits."""
    tokens = torch.zeros_like(cache.positions)
    logits = token_logits(model, tokens, cache, cache.positions)
    session.undo_append(cache)
    return logits


def mismatch(
    context: Context, twin: PreTrainedModel, cache: DecodeCache, length: int
) -> str | None:
    """Return a reason if, with all tokens selected, the logits differ from full attention's.

    Args:
        context: The method's context.
        twin: The model with which full attention decodes.
        cache: The cache of both.
        length: Its tokens.
    """
    model, policy = context.loaded.model, replace(context.policy, k=length)
    with attach(model, context.method, policy) as session:
        actual = step(model, session, cache).float()
    with attach(twin, context.full, policy) as session:
        expected = step(twin, session, cache).float()
    error = float((actual - expected).norm() / expected.norm())
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if error <= tolerance:
        return None
    return (
        f"with k at all {length} tokens the logits must be full attention's within {tolerance}, got"
        f" a difference of {error:.3g}."
    )


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model with shared weights, so that two methods can be attached at once."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def random_keys(geometry: Geometry) -> PlantedCalibration:
    """Return two sequences of random keys, the same in every layer, to fit a method on."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, geometry.num_kv_heads, CALIBRATION_TOKENS, geometry.head_dim)
    group = geometry.num_heads // geometry.num_kv_heads
    drawn = [
        (keys.repeat_interleave(group, 0), keys) for keys in torch.randn(shape, generator=generator)
    ]
    return PlantedCalibration(len(drawn), drawn, geometry.num_layers)
