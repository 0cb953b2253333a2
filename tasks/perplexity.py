"""Likelihood of text: negative log-likelihood, and how far the predictions are from full's."""

import fnmatch
import hashlib
import json
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow
import pyarrow.parquet
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from topkbench.harness.decoding import Decoder, Prompt, known_tokens, positions_of
from topkbench.harness.reads import (
    ReadCount,
    ReadCounter,
    accounting,
    density_of_all_layers,
    no_sparse_step_reason,
)
from topkbench.harness.samples import Sample, TaskDoesNotFit, check_window
from topkbench.harness.sweep import Plan, PromptTask, Record, Steps
from topkbench.harness.task import Context, Outcome, TaskRow
from topkbench.harness.texts import python_topics
from topkbench.methods.base import AnyMethod, Observer, check_list, check_whole
from topkbench.models.encoding import beginning
from topkbench.models.load import LoadedModel, ModelNotAvailable, ModelShape, needs_text

POOL = 16  # windows from which one is drawn
TOGETHER = 64  # tokens of each window in one forward, which bounds the memory of their logits
SUBTASK = "mean"
PYTHON = "Python's documentation topics, second half"


@dataclass(kw_only=True)
class Perplexity(PromptTask):
    """Likelihood of the last tokens of windows of text, given what comes before.

    A window's first tokens are prefilled densely. The next ones are decoded with the method, as
    they are in the text, and each predicts the one after it: ``scored_tokens`` predictions. On the
    same tokens full attention is run, so that each prediction is compared with its own.

    A text is cut into windows without overlap; texts that are shorter than a window are joined
    until they fill one. Of the first ``16 * windows`` windows, ``windows`` are drawn. Each begins
    with the tokens that the tokenizer puts before a text; there is no chat template.

    Attributes:
        length: Tokens of a window; None for 4,096, or the model's window if that is shorter.
        windows: Number of windows.
        scored_tokens: Tokens of each that are predicted.
        seed: Of the choice of windows.
        files: Paths of texts in UTF-8; None for ``dataset``, or else the half of Python's
            documentation topics that no method is fitted on.
        dataset: A data set of the hub, or a folder, that holds Parquet files.
        dataset_files: Which of its files, as a pattern of their paths; None for all of a folder,
            and for those with ``test`` in their path of a data set of the hub.
        column: The files' column of texts.
        batch_size: At most this many windows decode together.
    """

    name: str = "perplexity"
    length: int | None = None
    windows: int = 8
    scored_tokens: int = 256
    seed: int = 0
    files: Sequence[str] | None = None
    dataset: str | None = None
    dataset_files: str | None = None
    column: str = "text"
    batch_size: int | Literal["auto"] = 4
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"likelihoods": frozenset()}
    together: ClassVar[frozenset[str]] = frozenset({"likelihoods"})
    _cut: dict[str, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.length is not None:
            check_whole("task.length", self.length, least=2)
        for knob in ("windows", "scored_tokens"):
            check_whole(f"task.{knob}", getattr(self, knob))
        check_whole("task.seed", self.seed, least=0)
        self.check_batch_size()
        if self.files is not None:
            check_list("task.files", self.files)
            if self.dataset is not None:
                raise ValueError(
                    "texts are those of task.files or of task.dataset, got both; leave one out."
                )
            for file in self.files:
                if not Path(file).is_file():
                    raise ValueError(f"task.files must be files, found none at {file!r}.")

    def check_model(self, shape: ModelShape) -> None:
        if not shape.has_tokenizer:
            raise ModelNotAvailable(needs_text(shape.name))
        length = self._length(shape.window)
        check_window("task.length", length, shape.name, shape.window)
        if length < self.scored_tokens + 2:
            raise TaskDoesNotFit(
                f"task.length must leave a context before {self.scored_tokens} scored tokens, got"
                f" {length}; use a smaller task.scored_tokens."
            )

    def _length(self, window: int) -> int:
        return min(4096, window) if self.length is None else self.length

    def inputs_digest(self, loaded: LoadedModel) -> str:
        ids = [[*one.prefill_ids, *one.decode_ids] for one in self.tokenised(loaded)]
        return _digest([self.scored_tokens, ids])

    def prompts(self, loaded: LoadedModel) -> str:
        source = self.dataset or PYTHON
        if self.files is not None:
            source = ", ".join(Path(file).name for file in self.files)
        # Of all windows from which a seed draws its own, so that seeds are pooled.
        digest = _digest([self.scored_tokens, self.windows, self._windows(loaded)])
        return f"{source} ({digest})"

    def tokenised(self, loaded: LoadedModel) -> list[Prompt]:
        """Return the windows: what is prefilled, then the decoded tokens and the last target.

        Raises:
            TaskDoesNotFit: If the texts do not fill as many windows.
        """
        length, first = self._length(loaded.window), beginning(loaded.tokenizer)
        found = self._windows(loaded)
        chosen = sorted(random.Random(self.seed).sample(range(len(found)), self.windows))
        cut = length - self.scored_tokens - 1
        drawn = []
        for number in chosen:
            ids = [*first, *found[number]]
            sample = Sample(
                sample_id=f"window-{length}-{number}",
                subtask=SUBTASK,
                context="",
                question="",
                answer_prefix="",
                answers=(),
                max_new_tokens=0,
                length=length,
            )
            is_long = positions_of(loaded, cut, length, sample.sample_id)
            drawn.append(Prompt(sample, tuple(ids[:cut]), tuple(ids[cut:]), is_long))
        return drawn

    def _windows(self, loaded: LoadedModel) -> list[list[int]]:
        """Return the windows from which some are drawn, without a text's first tokens."""
        if loaded.digest not in self._cut:
            length = self._length(loaded.window)
            size = length - len(beginning(loaded.tokenizer))
            most = POOL * self.windows
            found = list(_windows(self._texts(), loaded.tokenizer, size, most))
            if len(found) < self.windows:
                raise TaskDoesNotFit(
                    f"the texts must fill task.windows={self.windows} windows of {length} tokens of"
                    f" {loaded.name} without overlap, got {len(found)}; use fewer or shorter"
                    " windows, or other texts."
                )
            self._cut[loaded.digest] = found
        return self._cut[loaded.digest]

    def _texts(self) -> Iterator[str]:
        if self.files is None and self.dataset is None:
            yield python_topics("second")
        for file in self.files or ():
            try:
                yield Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"task.files must be readable texts in UTF-8: {error}.") from None
        if self.dataset is not None:
            yield from _rows(_parquet_files(self.dataset, self.dataset_files), self.column)

    def plan(self, context: Context, prompts: Sequence[Prompt]) -> Plan | Outcome:
        k, longest = context.effective_policy.k, prompts[0].num_tokens - 1
        if context.method.selects and k >= longest:
            return Outcome([TaskRow("mean", {}, "skipped", no_sparse_step_reason(k, longest))], [])
        return Plan({"likelihoods": frozenset(one.sample.sample_id for one in prompts)})

    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        method, counter = context.answering, ReadCounter()
        key = ("log-probabilities", *prompts)
        if key not in context.store.shared:  # all cells are compared with the same
            parts = log_probabilities(context, context.answering_full, prompts)
            context.store.shared[key] = torch.cat(list(parts), 1)
        full, begin = context.store.shared[key], 0
        windows: list[dict[str, list[float]]] = [{} for _ in prompts]
        for found in log_probabilities(context, method, prompts, counter):
            end = begin + found.shape[1]
            for row, one in enumerate(prompts):
                targets = torch.tensor(one.decode_ids[begin + 1 : end + 1], device=found.device)
                for name, values in compared(found[row], full[row, begin:end], targets).items():
                    windows[row].setdefault(name, []).extend(values)
            begin = end
        counts = [self.scored_tokens] * len(prompts)
        return {
            "windows": [
                {"sample_id": one.sample.sample_id, **values}
                for one, values in zip(prompts, windows, strict=True)
            ],
            "count": asdict(counter.count),
            "known_tokens": known_tokens(context.loaded, method, counts)
            if method.selects
            else None,
        }

    def steps(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Steps:
        counts = [self.scored_tokens] * len(prompts)
        rows = sum(counts)
        if known_tokens(context.loaded, context.answering, counts) == "one by one":
            return Steps(self.scored_tokens, own=rows)
        return Steps(math.ceil(self.scored_tokens / TOGETHER), own=rows)

    def trial(
        self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]
    ) -> tuple[Record, float]:
        tokens = min(TOGETHER, self.scored_tokens)
        short = [replace(one, decode_ids=one.decode_ids[: tokens + 1]) for one in prompts]
        return self.measure(context, plan, part, short), self.scored_tokens / tokens

    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        count, selects = ReadCount(), context.method.selects
        for record in records["likelihoods"]:
            count.add(ReadCount(**record["count"]))
        windows = [one for record in records["likelihoods"] for one in record["windows"]]
        samples = [
            {
                "sample_id": one["sample_id"],
                "subtask": SUBTASK,
                "length": prompts[0].num_tokens,
                **{name: statistics.fmean(one[name]) for name in one if name != "sample_id"},
            }
            for one in windows
        ]
        values: dict[str, Any] = {
            "length": prompts[0].num_tokens,
            "num_samples": len(samples),
            "scored_tokens": sum(len(one["nll"]) for one in windows),
            "nll": statistics.fmean(one["nll"] for one in samples),
            "batch_size": 1,
            "prompts_per_batch": min(
                record.get("share", min(self.batch_size, len(samples)))
                for record in records["likelihoods"]
            ),
            "density": count.density,
        }
        begin = len(prompts[0].prefill_ids) + 1
        cached = begin + (self.scored_tokens - 1) // 2  # at the step in the middle
        if selects:
            values |= {
                "nll_delta": statistics.fmean(one["nll"] - one["full_nll"] for one in samples),
                "kl_full": statistics.fmean(one["kl_full"] for one in samples),
                "top1_agreement": statistics.fmean(one["top1_agreement"] for one in samples),
                "sparse_step_share": count.share_taken,
            }
            known = {record["known_tokens"] for record in records["likelihoods"]}
            values["known_tokens"] = ", ".join(sorted(known))
        values |= accounting(context, cached, count.step_reads)
        values["density_all"] = density_of_all_layers(
            context, count.mean_cached(cached), count.density
        )
        return Outcome([TaskRow(SUBTASK, values)], samples)


def log_probabilities(
    context: Context, method: AnyMethod, prompts: Sequence[Prompt], observer: Observer | None = None
) -> Iterator[Tensor]:
    """Decode windows with a method.

    Args:
        context: The cell's context.
        method: The method.
        prompts: Windows of equal length.
        observer: Called at each stage and step.

    Yields:
        float32 ``[B, tokens, vocabulary]`` the log-probabilities of the next token after each
        decoded one, at most ``TOGETHER`` tokens at a time.
    """
    given = [prompt.decode_ids[:-1] for prompt in prompts]
    num_scored = len(given[0])
    how = known_tokens(context.loaded, method, list(map(len, given)))
    decoder = Decoder(context.loaded, context.store, prompts, 0, method.traits.needs)
    with context.attached(decoder, method, observer) as session:
        for begin in range(0, num_scored, TOGETHER):
            part = [tokens[begin : begin + TOGETHER] for tokens in given]
            if how == "one by one":
                logits = decoder.one_by_one(part, every=True)
            else:
                logits = decoder.forward(part, every=True)
            yield logits.float().log_softmax(-1)
    if isinstance(observer, ReadCounter):
        observer.add_steps(session.count, decoder.lengths)


def compared(found: Tensor, full: Tensor, targets: Tensor) -> dict[str, list[float]]:
    """Compare a window's predictions with full attention's, token by token.

    Args:
        found: ``[scored, vocabulary]`` log-probabilities of the next token.
        full: The same of full attention.
        targets: int64 ``[scored]`` the tokens of the text.

    Returns:
        ``nll`` and ``full_nll``, the negative log-likelihoods in nats; ``kl_full``, the
        Kullback-Leibler divergence of the distribution from full attention's, in nats; and
        ``top1_agreement``, 1.0 where the likeliest token is the same, else 0.0.
    """
    at = targets[:, None]
    return {
        "nll": (-found.gather(1, at)[:, 0]).tolist(),
        "full_nll": (-full.gather(1, at)[:, 0]).tolist(),
        "kl_full": (full.exp() * (full - found)).sum(1).clamp_min(0).tolist(),
        "top1_agreement": (found.argmax(1) == full.argmax(1)).double().tolist(),
    }


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _windows(texts: Iterable[str], tokenizer: Any, size: int, most: int) -> Iterator[list[int]]:
    """Yield at most ``most`` windows of ``size`` tokens."""
    waiting, num_found = "", 0
    for text in texts:
        joined = f"{waiting}\n\n{text}" if waiting else text
        ids = []
        if len(joined) >= size:
            ids = tokenizer.encode(joined, add_special_tokens=False, verbose=False)
        if len(ids) < size:
            waiting = joined
            continue
        waiting = ""
        for begin in range(0, len(ids) - size + 1, size):
            yield ids[begin : begin + size]
            num_found += 1
            if num_found == most:
                return


def _parquet_files(dataset: str, given: str | None) -> list[Path]:
    """Return the Parquet files of a folder, or of a data set that is fetched from the hub."""
    folder = Path(dataset).expanduser()
    pattern = given or ("*.parquet" if folder.is_dir() else "*test*.parquet")
    if not folder.is_dir():
        try:
            fetched = snapshot_download(dataset, repo_type="dataset", allow_patterns=[pattern])
        except Exception as error:  # the hub's errors have no class in common
            raise ValueError(
                f"task.dataset must be a folder, or a data set of the hub that can be reached, got"
                f" {dataset!r}: {' '.join(str(error).split())[:200]}"
            ) from None
        folder = Path(fetched)
    files = [
        path
        for path in sorted(folder.rglob("*.parquet"))
        if fnmatch.fnmatch(path.relative_to(folder).as_posix(), pattern)
    ]
    if not files:
        raise ValueError(
            f"task.dataset must hold Parquet files whose path is like task.dataset_files="
            f"{pattern!r}, found none in {dataset}."
        )
    return files


def _rows(files: Sequence[Path], column: str) -> Iterator[str]:
    """Yield the texts of a column."""
    for path in files:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            if column not in file.schema_arrow.names:
                raise ValueError(
                    f"task.column must be one of {', '.join(file.schema_arrow.names)} of"
                    f" {path.name}, got {column!r}."
                )
            for batch in file.iter_batches(batch_size=16, columns=[column]):
                yield from (str(text) for text in batch.column(0).to_pylist() if text)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path.name} must be a Parquet file: {error}.") from None
