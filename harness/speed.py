"""The time of a model's decode steps, full attention and a method in turn."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from topkbench.harness.decoding import Decoder, Prompt
from topkbench.harness.layer import STAGES
from topkbench.harness.task import Context
from topkbench.kernels.timing import LEAST_PAIRS, OtherLoad, Stages, read_bandwidth, speed_columns
from topkbench.methods.base import AnyMethod, Observer

TIMED_ROUNDS = 3
TIMED_STEPS = 8
WARM_UP_STEPS = 2


class StageTimes(Observer):
    """Times the stages of decode steps."""

    def __init__(self, device: torch.device) -> None:
        self.stages = Stages(device)

    def stage(self, name: str, layer: int) -> Any:
        return self.stages(name)


def rounds_of(num_prompts: int) -> int:
    """Return how often full attention and the method take turns on each timed prompt.

    With few prompts, each takes more turns, to give enough pairs for a confidence interval.

    Args:
        num_prompts: Prompts on which the cell is timed.
    """
    return max(TIMED_ROUNDS, math.ceil(LEAST_PAIRS / num_prompts))


def turn_steps() -> int:
    """Return the steps of a turn; a round has one of full attention and two of the method."""
    return WARM_UP_STEPS + TIMED_STEPS


def memory_bandwidth(device: torch.device) -> float | None:
    """Return the memory's bandwidth in bytes per second; None if there is no memory to try it."""
    try:
        return read_bandwidth(device, trials=3).ceiling_gb_s * 1e9
    except (MemoryError, torch.OutOfMemoryError):
        return None


def time_prompt(context: Context, prompt: Prompt, rounds: int) -> dict[str, Any]:
    """Time decode steps of one prompt, full attention and the method in turn.

    The first steps of each turn build the index and are discarded as warm-up. Stages are timed in
    separate turns, since timers inside a step cost time.

    Args:
        context: The cell's context.
        prompt: The prompt.
        rounds: How often they take turns.

    Returns:
        The milliseconds of each step by turn, and of each stage, and the memory's bandwidth, as
        plain values.
    """
    device = context.loaded.model.device
    load = OtherLoad(device)
    per_round = 3 * turn_steps()
    turn_ms: dict[str, list[list[float]]] = {"full": [], "method": []}
    stages: dict[str, list[float]] = {}
    cache_bytes: list[int] = []
    new_tokens = rounds * per_round + 1
    decoder = decoder_after_question(context, prompt, new_tokens)
    # Every step decodes the same token, since only the time matters.
    token = decoder.first_logits.argmax(-1)
    for _ in range(rounds):
        for name, method in (("full", context.full), ("method", context.method)):
            used = decoder
            if method.compacts:  # it frees tokens that the next turn needs, so use a fresh one
                used = decoder_after_question(context, prompt, new_tokens)
            turn_ms[name].append(_timed_steps(context, used, method, token, Observer()))
            if name == "method":
                cache_bytes.append(used.cache.num_bytes)
        observer = StageTimes(device)
        if context.method.compacts:
            used = decoder_after_question(context, prompt, new_tokens)
        _timed_steps(context, used, context.method, token, observer)
        steps = turn_steps()
        for stage, milliseconds in observer.stages.times().items():
            if stage == "build":
                # The time to capture what the method needs at prefill counts as build time.
                build_ms = sum(milliseconds) + decoder.needs_ms[0]
                stages.setdefault(stage, []).append(build_ms)
                continue
            layers = len(milliseconds) // steps  # the layers that have this stage
            per_step = [
                sum(milliseconds[step * layers : (step + 1) * layers])
                for step in range(WARM_UP_STEPS, steps)
            ]
            stages.setdefault(stage, []).extend(per_step)
    return {
        "turn_ms": turn_ms,
        "stages": stages,
        "prefill_ms": decoder.prefill_ms[0],
        "cache_bytes": cache_bytes,
        "other_load": load.share(),
        "full_backend": getattr(context.full, "backend", None),
        "bandwidth": context.bandwidth,
    }


def speed_of(
    context: Context, timed: Sequence[dict[str, Any]], bytes_read: float
) -> dict[str, Any]:
    """Return a row's columns on speed: medians over the steps of all timed prompts.

    Args:
        context: The cell's context.
        timed: What `time_prompt` returned for each prompt.
        bytes_read: Bytes that a step reads.
    """
    turns = {
        name: [turn for one in timed for turn in one["turn_ms"][name]]
        for name in ("full", "method")
    }
    stages: dict[str, list[float]] = {}
    for one in timed:
        for stage, milliseconds in one["stages"].items():
            stages.setdefault(stage, []).extend(milliseconds)
    loads = [one["other_load"] for one in timed]
    load = None if None in loads else statistics.fmean(loads)
    columns: dict[str, Any] = {
        "speedup_vs_full": None,
        **speed_columns(turns["method"], turns["full"] if context.method.selects else None, load),
        "prefill_ms": statistics.median(one["prefill_ms"] for one in timed),
        "full_backend": timed[0]["full_backend"],
        "kv_cache_mib": statistics.fmean(
            num_bytes for one in timed for num_bytes in one["cache_bytes"]
        )
        / 2**20,
    }
    columns["tokens_per_s"] = 1e3 / columns["decode_ms_p50"]
    for stage in ("build", *STAGES):
        columns[f"{stage}_ms"] = statistics.median(stages[stage]) if stage in stages else None
    if not context.method.selects and "full" in stages:
        columns["attend_ms"] = statistics.median(stages["full"])
    attention = sum(columns[f"{stage}_ms"] or 0.0 for stage in STAGES)
    if context.method.selects and "full" in stages:  # the layers that the policy keeps dense
        attention += statistics.median(stages["full"])
    bandwidths = [one["bandwidth"] for one in timed]
    if attention and None not in bandwidths:
        bandwidth = statistics.median(bandwidths)
        columns["bandwidth_fraction"] = bytes_read / (attention * 1e-3) / bandwidth
    return columns


def decoder_after_question(context: Context, prompt: Prompt, new_tokens: int) -> Decoder:
    """Return a decoder that has read a prompt and its question with dense attention."""
    decoder = Decoder(
        context.loaded, context.store, [prompt], new_tokens, context.method.traits.needs
    )
    with context.attached(decoder, context.answering_full):
        decoder.read_question()
    return decoder


def _timed_steps(
    context: Context, decoder: Decoder, method: AnyMethod, token: torch.Tensor, observer: Observer
) -> list[float]:
    """Run one turn; return the milliseconds of each step after the warm-up."""
    stages = Stages(decoder.device)
    with context.attached(decoder, method, observer):
        for _ in range(turn_steps()):
            with stages("step"):
                logits = decoder.step(token)
    decoder.check(logits)  # NaN and infinity persist, so checking the last step is enough
    return stages.times()["step"][WARM_UP_STEPS:]
