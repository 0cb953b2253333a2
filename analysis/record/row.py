"""The row: everything that is recorded of one cell and one sub-task, with units."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from topkbench.analysis.record.column import Column, Curve, column

Scalar = str | int | float | bool | None

PARAMETER_PREFIX = "p_"


class RecordError(Exception):
    """A record that breaks a rule; the message says the rule, the finding and the remedy."""


class Status(enum.StrEnum):
    """How a cell ended."""

    OK = "ok"
    SKIPPED = "skipped"
    WRONG = "wrong"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    INTERRUPTED = "interrupted"

    @property
    def settled(self) -> bool:
        """Whether the cell ended as it should; it then need not run again, see `Row.settled`."""
        return self in (Status.OK, Status.SKIPPED)


MIB = 2.0**20


@dataclass(kw_only=True)
class Row:
    """One cell and one sub-task; a task with sub-tasks also has a row for their mean.

    A value of None means not requested, not measured or not meaningful.
    """

    run_id: str
    """Identity of the cell: 16 hexadecimal digits, the same in every process."""
    status: Status
    """How the cell ended."""
    reason: str = ""
    """One sentence for every status but ok; empty for ok."""
    model: str
    """Name of the model's configuration; a layer's shape for tasks without a model."""
    task: str
    """Name of the task's configuration."""
    subtask: str
    """Name of the sub-task, or ``mean`` for the mean over a cell's sub-tasks."""
    length: int | None = None
    """Requested prompt length, in tokens of the model."""
    method: str
    """Name of the method's configuration."""
    method_label: str | None = None
    """The method's name in tables and figures, of its configuration; None if it has none."""
    method_colour: str | None = None
    """The method's colour in figures as ``#RRGGBB``, of its configuration; None if it has none."""
    impl: str | None = None
    """Kernel implementation that ran: reference, cpu, triton, or one per operator."""
    full_backend: str | None = None
    """Kernel of full attention that ran, or that the method was timed against: sdpa, triton, ..."""
    protocol: str | None = None
    """Name of the selection policy; None for a method that selects nothing."""
    question: str | None = None
    """``dense``: the question is prefilled; ``sparse``: it is decoded with the method."""
    known_tokens: str | None = None
    """How the question, whose tokens are known, was decoded: ``together`` in one forward of the
    model and one call of the method in each layer, ``in turn`` in one forward and one step after
    the other in each layer, ``one by one`` in a forward each. None where it was prefilled."""
    k: int | None = column(
        label="Budget k", unit="tokens kept per KV head", format=".0f", scale="log"
    )
    """Selected tokens per KV head and decode step, including sinks and recent tokens."""
    kv_len: int | None = column(
        label="Context length", unit="cached tokens", format=".0f", scale="log"
    )
    """Cached tokens at the measured decode step."""
    prompts_per_batch: int | None = None
    """Most prompts whose answers were decoded together; where memory ran out in some batch, of the
    smallest share of it."""
    batch_size: int | None = column(label="Batch size", format=".0f", scale="log")
    """Prompts decoded together in the timed pass."""
    rbit: int | None = column(
        label="Hash bits, rbit", unit="bits per key", format=".0f", scale="log"
    )
    """Hash bits per key and KV head."""
    seed: int | None = None
    """Seed of the data and of the method's random draws."""
    num_samples: int | None = None
    """Number of scored samples; for the mean, of all sub-tasks."""
    prompts: str | None = None
    """Where the prompts come from: ``topkbench`` and the version of its prompts, or ``RULER``, the
    digest of the files, and whether they are raw or in a chat template; of ``task=multi_turn`` also
    ``history prefilled``, if each turn begins from a prefill of its own."""
    wanted_samples: int | None = None
    """Number of samples that were asked for; the files may hold fewer. None without files."""
    source_samples: int | None = None
    """Number of samples in the files, of which ``num_samples`` were scored; None without files."""
    skipped_samples: int | None = None
    """Number of bad lines in the files, which ``task.skip_bad`` left out; None without files."""
    truncated_samples: int | None = None
    """Number of samples whose prompts were shortened, as ``task.truncate`` says; None without."""
    judged_prompts: int | None = None
    """Number of prompts on which the selections were measured; None if they were not."""
    judged_tokens: int | None = None
    """Number of decode steps, over all of these prompts, at which the selections were measured;
    None if they were not, and in older rows, which measured all steps of question and answer."""
    timed_prompts: int | None = None
    """Number of prompts on which the times were measured; None without prompts or times."""
    parameters: dict[str, Scalar] = field(default_factory=dict)
    """Other parameters of the method, flattened to columns ``p_<name>``."""

    score: float | None = column(
        label="Score",
        unit="0–100",
        better="higher",
        most=100.0,
        kind="result",
        head="Score",
        measured_on="scores",
        tracked=True,
        curve=Curve("score", "Score", "Bars and band: 95% intervals."),
    )
    """Mean score of the samples, 0 to 100, higher is better."""
    score_ci_low: float | None = column(kind="paired")
    """Lower end of the score's 95% interval, 0 to 100."""
    score_ci_high: float | None = column(kind="paired")
    """Upper end of the score's 95% interval, 0 to 100."""
    delta_full: float | None = column(
        label="Difference to full attention",
        unit="points",
        better="higher",
        format="+.1f",
        ends=("delta_ci_low", "delta_ci_high"),
        kind="paired",
        head="Δ full",
    )
    """Score minus full attention's on the same samples, points."""
    delta_ci_low: float | None = column(kind="paired")
    """Lower end of the paired difference's 95% interval, points."""
    delta_ci_high: float | None = column(kind="paired")
    """Upper end of the paired difference's 95% interval, points."""
    turn_change: float | None = column(
        label="Change since the first turn",
        unit="points",
        better="higher",
        format="+.1f",
        kind="paired",
    )
    """Score minus that of the first turn about the same documents, points; only in the rows of the
    later turns of ``task=multi_turn``."""
    turn_change_ci_low: float | None = column(kind="paired")
    """Lower end of its 95% interval over documents, points."""
    turn_change_ci_high: float | None = column(kind="paired")
    """Upper end of its 95% interval over documents, points."""
    full_note: str | None = None
    """Why the difference is missing or not informative: full attention failed, or scored 0."""
    generated_tokens: float | None = column(
        label="Generated tokens",
        unit="per answer",
        kind="result",
        measured_on="scores",
    )
    """Tokens of an answer, mean, its end token not counted."""
    generated_delta: float | None = column(
        label="Generated tokens over full attention's",
        unit="per answer",
        format="+.1f",
        kind="paired",
    )
    """``generated_tokens`` minus full attention's on the same samples."""
    generated_delta_ci_low: float | None = column(kind="paired")
    """Lower end of its 95% interval, tokens."""
    generated_delta_ci_high: float | None = column(kind="paired")
    """Upper end of its 95% interval, tokens."""
    cut_off_share: float | None = column(
        label="Answers cut off at their limit",
        unit="%",
        better="lower",
        divisor=0.01,
        kind="result",
        measured_on="scores",
    )
    """Share of the answers that reached the most tokens they may have without an end, 0 to 1."""
    cut_off_delta: float | None = column(
        label="Answers cut off over full attention's",
        unit="points",
        better="lower",
        format="+.1f",
        divisor=0.01,
        kind="paired",
    )
    """``cut_off_share`` minus full attention's on the same samples, -1 to 1."""
    cut_off_delta_ci_low: float | None = column(kind="paired")
    """Lower end of its 95% interval, -1 to 1."""
    cut_off_delta_ci_high: float | None = column(kind="paired")
    """Upper end of its 95% interval, -1 to 1."""
    nll: float | None = column(
        label="Negative log-likelihood",
        unit="nats/token",
        better="lower",
        format=".4f",
        kind="result",
        pooled="mean",
        head="NLL",
        measured_on="likelihoods",
    )
    """Negative log-likelihood of a token of the text, mean, nats; perplexity is its exponential."""
    nll_delta: float | None = column(
        label="Loss over full attention",
        unit="nats/token",
        better="lower",
        format="+.4f",
        scale="symlog",
        kind="result",
        pooled="mean",
        interval="windows",
        head="Δ NLL",
        measured_on="likelihoods",
        curve=Curve(
            "nll",
            "Likelihood of text",
            "Negative log-likelihood minus full attention's on the same tokens: 0 loses nothing; "
            "bars: 95% intervals over windows.",
            ("k",),
            of_full=0,
        ),
    )
    """``nll`` minus full attention's on the same tokens, nats."""
    nll_delta_ci_low: float | None = column(kind="paired")
    """Lower end of its 95% interval over windows, nats."""
    nll_delta_ci_high: float | None = column(kind="paired")
    """Upper end of its 95% interval over windows, nats."""
    kl_full: float | None = column(
        label="KL divergence from full attention",
        unit="nats/token",
        better="lower",
        format=".4f",
        scale="log",
        kind="result",
        pooled="mean",
        interval="windows",
        head="KL",
        measured_on="likelihoods",
        curve=Curve(
            "kl",
            "KL divergence from full attention",
            "Lower is better; bars: 95% intervals over windows.",
            ("k",),
        ),
    )
    """Kullback-Leibler divergence of the predicted distribution from full attention's, mean over
    tokens, nats."""
    kl_full_ci_low: float | None = column(kind="paired")
    """Lower end of its 95% interval over windows, nats."""
    kl_full_ci_high: float | None = column(kind="paired")
    """Upper end of its 95% interval over windows, nats."""
    top1_agreement: float | None = column(
        label="Same likeliest next token as full attention",
        better="higher",
        format=".3f",
        most=1.0,
        kind="result",
        pooled="mean",
        head="Same token",
        measured_on="likelihoods",
    )
    """Fraction of tokens after which the likeliest next token is full attention's, 0 to 1."""
    scored_tokens: int | None = None
    """Number of predicted tokens behind these, of all windows; ``num_samples`` counts windows."""
    recall_at_k: float | None = column(
        label="Recall@k",
        better="higher",
        format=".3f",
        most=1.0,
        kind="result",
        pooled="mean",
        interval="seeds",
        head="Recall@k",
        measured_on="selection quality",
        tracked=True,
        curve=Curve("recall", "Recall of the exact top-k", "Higher is better.", of_full=None),
    )
    """Fraction of the exact top-k that was selected, 0 to 1; mean over layers, KV heads, steps."""
    recall_prompt: float | None = column(
        label="Recall@k among the prompt's tokens",
        better="higher",
        format=".3f",
        most=1.0,
        kind="result",
        pooled="mean",
        interval="seeds",
        measured_on="selection quality",
    )
    """Fraction of the exact top-k's tokens that were selected, of the prompt's alone, 0 to 1; over
    all judged steps together. None where no generated token is among the exact top-k."""
    recall_generated: float | None = column(
        label="Recall@k among the generated tokens",
        better="higher",
        format=".3f",
        most=1.0,
        kind="result",
        pooled="mean",
        interval="seeds",
        measured_on="selection quality",
    )
    """As ``recall_prompt``, of the tokens alone that were generated after the prompt."""
    attention_mass: float | None = column(
        label="Attention mass kept",
        better="higher",
        format=".3f",
        most=1.0,
        kind="result",
        pooled="mean",
        interval="seeds",
        head="Mass",
        minor=True,
        measured_on="selection quality",
        tracked=True,
    )
    """Softmax mass of full attention on the selected tokens, 0 to 1."""
    output_rel_error: float | None = column(
        label="Relative output error",
        better="lower",
        format=".3f",
        scale="log",
        kind="result",
        pooled="mean",
        interval="seeds",
        head="Output error",
        minor=True,
        measured_on="selection quality",
        tracked=True,
    )
    """Norm of the output's error divided by the norm of full attention's output."""
    density: float | None = column(
        label="Density (fraction of tokens read)",
        better="lower",
        format=".3f",
        pooled="mean",
        head="Density",
        minor=True,
    )
    """Fraction of the cached tokens read by the layers that use the method, 0 to 1, measured."""
    density_all: float | None = None
    """Fraction of the cached tokens read by all layers, dense and sliding-window included, 0 to 1.
    """
    sparse_step_share: float | None = None
    """Fraction of (layer, decode step) pairs that used the method, 0 to 1; the others had at most
    k tokens, or belong to layers that the policy or the model's design keeps dense.
    """

    bytes_read_per_step: float | None = column(
        label="Read per decode step",
        unit="MiB",
        better="lower",
        format=".3g",
        scale="log",
        divisor=MIB,
        pooled="mean",
        head="Read/step",
    )
    """Bytes of KV cache and side information that one decode step reads, all layers, one prompt."""
    index_bytes_per_token: float | None = column(
        label="Side information",
        unit="bytes/token",
        better="lower",
        format=".4g",
        scale="log",
        pooled="mean",
        head="Side info",
        minor=True,
    )
    """Bytes of side information per cached token, all layers and KV heads."""
    kv_cache_mib: float | None = column(
        label="KV cache in memory", unit="MiB", better="lower", format=".3g", scale="log"
    )
    """Keys and values in memory while a prompt is decoded, all layers, MiB; less than full
    attention's if the method frees the tokens that it drops."""
    peak_memory_mib: float | None = column(
        label="Peak memory", unit="MiB", better="lower", scale="log", pooled="mean"
    )
    """Peak memory of the cell, MiB (2**20 bytes); empty if a part of the cell was reused."""
    memory_needed_mib: float | None = None
    """Memory for want of which the row was skipped, MiB; empty for every other row."""

    prefill_ms: float | None = column(
        label="Prefill", unit="ms", better="lower", scale="log", kind="speed", pooled="median"
    )
    """Prefill of one prompt, milliseconds."""
    build_ms: float | None = column(
        label="Index build",
        unit="ms",
        better="lower",
        format=".2f",
        scale="log",
        kind="speed",
        pooled="median",
    )
    """Building the method's index over one prompt, all layers, milliseconds."""
    decode_ms_p50: float | None = column(
        label="Decode step, median",
        unit="ms",
        better="lower",
        format=".3g",
        scale="log",
        kind="speed",
        pooled="median",
        head="Decode step",
        measured_on="times",
        tracked=True,
    )
    """One decode step, median, milliseconds."""
    decode_ms_p20: float | None = column(kind="speed", pooled="median")
    """One decode step, 20th percentile, milliseconds."""
    decode_ms_p80: float | None = column(kind="speed", pooled="median")
    """One decode step, 80th percentile, milliseconds."""
    decode_ms_warm_p50: float | None = column(
        label="Decode step, warm",
        unit="ms",
        better="lower",
        format=".3g",
        scale="log",
        kind="speed",
        pooled="median",
        head="Warm step",
    )
    """One decode step repeated on the same data with warm caches, median, milliseconds."""
    encode_ms: float | None = column(
        label="Encode", unit="ms", better="lower", format=".3g", kind="speed", pooled="median"
    )
    """Encoding the query within one decode step, milliseconds."""
    append_ms: float | None = column(
        label="Append", unit="ms", better="lower", format=".3g", kind="speed", pooled="median"
    )
    """Adding the new token to the index within one decode step, milliseconds."""
    score_ms: float | None = column(
        label="Score", unit="ms", better="lower", format=".3g", kind="speed", pooled="median"
    )
    """Scoring the cached units within one decode step, milliseconds."""
    select_ms: float | None = column(
        label="Select", unit="ms", better="lower", format=".3g", kind="speed", pooled="median"
    )
    """Selecting the units within one decode step, milliseconds."""
    attend_ms: float | None = column(
        label="Attend", unit="ms", better="lower", format=".3g", kind="speed", pooled="median"
    )
    """Attention over the selected tokens within one decode step, milliseconds."""
    tokens_per_s: float | None = column(
        label="Throughput",
        unit="tokens/s",
        better="higher",
        scale="log",
        kind="speed",
        pooled="median",
        head="Throughput",
        minor=True,
        measured_on="times",
    )
    """Decoded tokens a second over the whole batch."""
    full_ms_p50: float | None = column(
        label="Full attention's step, timed alternately",
        unit="ms",
        better="lower",
        format=".3g",
        kind="speed",
        pooled="median",
        head="Full attention",
        tracked=True,
    )
    """Full attention's decode step timed alternately with this one, median, milliseconds."""
    full_ms_p20: float | None = column(kind="speed", pooled="median")
    """Full attention's decode step timed alternately with this one, 20th percentile, milliseconds.
    """
    full_ms_p80: float | None = column(kind="speed", pooled="median")
    """Full attention's decode step timed alternately with this one, 80th percentile, milliseconds.
    """
    speedup_vs_full: float | None = column(
        label="Speed-up over full",
        unit="×",
        better="higher",
        format=".2f",
        kind="speed",
        pooled="median",
        head="Speed-up",
        ends=("speedup_ci_low", "speedup_ci_high"),
        tracked=True,
    )
    """``full_ms_p50`` divided by ``decode_ms_p50``, timed alternately."""
    speedup_ci_low: float | None = column(kind="speed", tracked=True)
    """Lower end of the speed-up's 95% interval over pairs timed alternately, a ratio."""
    speedup_ci_high: float | None = column(kind="speed", tracked=True)
    """Upper end of the speed-up's 95% interval over pairs timed alternately, a ratio."""
    sdpa_ms_p50: float | None = column(
        label="Full attention by SDPA, timed alternately",
        unit="ms",
        better="lower",
        format=".3g",
        kind="speed",
        pooled="median",
        head="SDPA",
        minor=True,
    )
    """Full attention's decode step by torch's SDPA, timed alternately, median, milliseconds; None
    if it was not, or ``full_backend`` is SDPA."""
    speedup_vs_sdpa: float | None = column(
        label="Speed-up over SDPA",
        unit="×",
        better="higher",
        format=".2f",
        kind="speed",
        pooled="median",
        head="× SDPA",
        ends=("sdpa_ci_low", "sdpa_ci_high"),
        minor=True,
    )
    """``sdpa_ms_p50`` divided by ``decode_ms_p50``, timed alternately."""
    sdpa_ci_low: float | None = column(kind="speed")
    """Lower end of the 95% interval of the speed-up over SDPA, a ratio."""
    sdpa_ci_high: float | None = column(kind="speed")
    """Upper end of the 95% interval of the speed-up over SDPA, a ratio."""
    other_load: float | None = column(kind="speed")
    """Share of processor time that other processes took during timing, 0 to 1; None if unknown."""
    timing_note: str | None = column(kind="speed", tracked=True)
    """Why the times are unreliable; None if they are reliable."""
    bandwidth_fraction: float | None = column(
        label="Memory bandwidth reached",
        unit="% of measured",
        better="higher",
        format=".0f",
        divisor=0.01,
        kind="speed",
        pooled="mean",
        head="Bandwidth",
        minor=True,
        tracked=True,
    )
    """Achieved divided by measured memory bandwidth; above 1 only if the states fit in a cache.

    Of a layer's steps both are measured in turn, in trials of their own; of a whole model's the
    bandwidth is that just before the timed prompt. Older code measured it once a process.
    """
    bandwidth_gb_s: float | None = column(pooled="mean")
    """Measured memory bandwidth, 1e9 bytes a second: the denominator of ``bandwidth_fraction``."""

    fit_s: float | None = column(
        label="Fit",
        unit="s",
        better="lower",
        format=".3g",
        scale="log",
        pooled="median",
        head="Fit",
    )
    """Wall time of the fit that made the artifact, calibration included, seconds; empty if the
    artifact existed before."""
    loss_first: float | None = column(
        label="First loss", better="lower", format=".4g", pooled="mean", head="First loss"
    )
    """Training loss at the first step; for the mean, over layers."""
    loss_last: float | None = column(
        label="Last loss", better="lower", format=".4g", pooled="mean", head="Last loss"
    )
    """Training loss at the last step; for the mean, over layers."""
    calibration: str | None = None
    """Description of the calibration data that the artifact was fitted on."""
    artifact_path: str | None = None
    """Path of the artifact."""

    device: str | None = None
    """The machine: name of the processor or accelerator."""
    clock_mhz: float | None = None
    """Clock of the processor or accelerator just after timing, MHz; None if unknown."""
    driver: str | None = None
    """Version of the accelerator's driver; None without one."""
    torch: str | None = None
    """Version of torch."""
    threads: int | None = None
    """Threads that torch used on a CPU."""
    huge_pages: bool | None = None
    """Whether large tensors on a CPU were in huge pages."""
    omp_wait_policy: str | None = None
    """The environment's OMP_WAIT_POLICY, on which times of short steps depend, or "not set"."""
    numba: str | None = None
    """Version of numba."""
    triton: str | None = None
    """Version of triton; None if it is not installed."""
    transformers: str | None = None
    """Version of transformers."""
    tokenizers: str | None = None
    """Version of tokenizers."""
    numpy: str | None = None
    """Version of numpy."""
    git_commit: str | None = None
    """Commit of the code that ran."""
    git_dirty: bool | None = None
    """Whether the working tree differed from that commit."""
    started_at: str | None = None
    """When the cell began, ISO 8601 in UTC."""
    code_digest: str | None = None
    """Digest of the sources that computed the cell: its method, task, models and kernels."""
    model_digest: str | None = None
    """Digest of weights, configuration, tokenizer, chat template and generation settings."""
    reused: str | None = None
    """Parts of the cell (answers, selections, speed) that were not measured by it in one run: they
    were found, wholly or in part, or measured by another cell or process."""
    artifact_code: str | None = None
    """``same`` if the artifact was fitted by the present code, else ``other`` or ``unknown``; None
    for a method that learns nothing."""
    artifact_digest: str | None = None
    """Digest of the method's artifact; None for a method that learns nothing."""
    config_digest: str | None = None
    """Digest of the configuration without its seeds and sub-tasks: cells that share it differ in
    these alone."""
    full_run_id: str | None = None
    """Identity of the full-attention cell that the differences refer to; None if there is none."""

    def __post_init__(self) -> None:
        """Check types, the status's rules and the parameters' names.

        Raises:
            RecordError: If a value has the wrong type, a colour is not ``#RRGGBB``, a speed stands
                in a row that is not ok, a reason is missing, or a parameter hides a column.
        """
        try:
            self.status = Status(self.status)
        except ValueError:
            names = ", ".join(status.value for status in Status)
            raise RecordError(f"status must be one of {names}, got {self.status!r}.") from None
        for name, (accepted, text) in _FIELD_TYPES.items():
            value = getattr(self, name)
            if isinstance(value, float) and math.isnan(value):
                setattr(self, name, None)
            elif (
                not isinstance(value, accepted)
                or (isinstance(value, bool) and bool not in accepted)
                or (isinstance(value, float) and math.isinf(value))
            ):
                raise RecordError(f"{name} must be {text}, got {value!r}.")
        if self.method_colour and not re.fullmatch("#[0-9A-Fa-f]{6}", self.method_colour):
            raise RecordError(f"a colour must be a quoted '#RRGGBB', got {self.method_colour!r}.")
        if self.status is not Status.OK:
            given = [name for name in MEASURED if getattr(self, name) is not None]
            if given:
                raise RecordError(
                    f"columns of scores, selections and speed must be empty unless status is ok, "
                    f"got {', '.join(given)} with status {self.status.value}."
                )
            if not self.reason:
                raise RecordError(
                    f"reason must say why the status is {self.status.value}, got nothing."
                )
        for name, value in self.parameters.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise RecordError(f"a method parameter must be an identifier, got {name!r}.")
            if value is not None and not isinstance(value, str | int | float | bool):
                raise RecordError(
                    f"method parameter {name} must be a number, a word or None, got {value!r}."
                )

    @property
    def settled(self) -> bool:
        """Whether the row would come out the same again: not if memory was short, which varies."""
        return self.status.settled and self.memory_needed_mib is None

    def flat(self) -> dict[str, Scalar]:
        """Return the row as a flat mapping, with parameters as ``p_<name>`` at the end."""
        values: dict[str, Scalar] = {name: getattr(self, name) for name in COLUMNS}
        values["status"] = self.status.value
        for name in sorted(self.parameters):
            values[PARAMETER_PREFIX + name] = self.parameters[name]
        return values

    @classmethod
    def from_flat(cls, values: Mapping[str, typing.Any]) -> Row:
        """Build a row from what `flat` returned.

        Raises:
            RecordError: If a column is unknown or missing, or a value does not fit.
        """
        parameters = {
            name.removeprefix(PARAMETER_PREFIX): value
            for name, value in values.items()
            if name.startswith(PARAMETER_PREFIX)
        }
        columns = {
            name: value for name, value in values.items() if not name.startswith(PARAMETER_PREFIX)
        }
        columns["task"] = present_task(columns)
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise RecordError(f"a row has no column {unknown[0]!r}; see analysis/record/row.py.")
        try:
            return cls(**columns, parameters=parameters)
        except TypeError as error:
            raise RecordError(f"a row must have every required column: {error}.") from None

    def replace(self, **changes: typing.Any) -> Row:
        """Return a checked copy with some columns changed."""
        return dataclasses.replace(self, **changes)


COLUMNS: tuple[str, ...] = tuple(
    item.name for item in dataclasses.fields(Row) if item.name != "parameters"
)
"""All columns of a row in order, without the method's parameters."""

DECLARED: dict[str, Column] = {
    item.name: item.metadata.get("column", Column())
    for item in dataclasses.fields(Row)
    if item.name != "parameters"
}
"""What is declared of each column of a row, in their order."""


def _of_kind(*kinds: str) -> tuple[str, ...]:
    return tuple(name for name, one in DECLARED.items() if one.kind in kinds)


SPEED_COLUMNS = _of_kind("speed")
"""Columns of times, and of what is derived from them: a wrong result has no speed."""

PAIRED_COLUMNS = _of_kind("paired")
"""Columns that `stats.paired_columns` and `stats.window_columns` compute from the samples."""

MEASURED = _of_kind("result", "paired", "speed")
"""Columns that stay empty unless the status is ok: no other cell has a valid result."""


def present_task(columns: Mapping[str, typing.Any]) -> typing.Any:
    """Return the task's present name: ``ruler`` over our own words is ``ruler_words`` since.

    Args:
        columns: A row's columns. Where ``prompts`` is no column at all, the row is older than it,
            and its prompts are ours if they have a length.
    """
    task = columns.get("task")
    if task != "ruler":
        return task
    if "prompts" in columns:
        return "ruler_words" if str(columns["prompts"]).startswith("topkbench") else task
    length = columns.get("length")
    return task if length is None or math.isnan(length) else "ruler_words"


def same_under_each_seed(prompts: object) -> bool:
    """Return whether prompts, by a row's column, were read, so that seeds may have the same."""
    text = str(prompts)
    if text.startswith(("lm-eval ", "files ")):  # each seed draws from the same documents
        return True
    return text.startswith("RULER ") and not text.startswith("RULER written by topkbench")


def _field_types() -> dict[str, tuple[tuple[type, ...], str]]:
    """Return, for each column, the accepted classes and their names for error messages."""
    accepted: dict[str, tuple[tuple[type, ...], str]] = {}
    for name, hint in typing.get_type_hints(Row).items():
        if name == "parameters":
            continue
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        words = " or ".join("None" if one is type(None) else one.__name__ for one in options)
        # An int is accepted as a float, as everywhere in Python; a bool is checked separately.
        accepted[name] = ((*options, int) if float in options else tuple(options), words)
    return accepted


_FIELD_TYPES = _field_types()
