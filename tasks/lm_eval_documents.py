"""lm-eval's tasks: their documents, prompts and scores, without its models."""

import contextlib
import difflib
import functools
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from topkbench.methods.base import check_whole

DEFAULT_NEW_TOKENS = 256
"""Tokens that a model may generate where a task does not say, as lm-eval's own models have it."""

FEWSHOT_SEED = 1234
"""Seed of the examples before a question, lm-eval's own default."""

OWN_TASKS = Path(__file__).with_name("lm_eval_tasks")
"""Tasks of benchmarks that lm-eval scores wrongly, in its form of YAML."""


@dataclass(frozen=True)
class Request:
    """One thing that lm-eval asks a model for a document.

    Attributes:
        text: The prompt, with examples and instruction.
        answer_prefix: Beginning of the answer, given to the model; it follows the text.
        continuation: The text whose likelihood is asked for; None if an answer is to be generated.
        until: Strings at which a generated answer ends; they are not part of it.
        max_new_tokens: Tokens that may be generated.
    """

    text: str
    answer_prefix: str = ""
    continuation: str | None = None
    until: tuple[str, ...] = ()
    max_new_tokens: int = 0


@dataclass(frozen=True)
class Document:
    """A document of a task, with what is asked of it.

    Attributes:
        number: Its place in the task's documents, counted from 0.
        fields: Its columns.
        requests: One, or one for each choice.
        target: What the right answer is, in words.
    """

    number: int
    fields: Mapping[str, Any]
    requests: tuple[Request, ...]
    target: tuple[str, ...]


class EvalTask:
    """A task of lm-eval.

    Args:
        task: lm-eval's own object.
        metric: The metric that is the score, or ``METRIC,FILTER``; None for the first of both.
        max_new_tokens: Tokens that an answer may have; None for what the task says.

    Attributes:
        name: Its name.
        version: Its version, as lm-eval states it.
        num_documents: How many documents it has.

    Raises:
        ValueError: If its requests or its metric cannot be had here; one sentence says why.
    """

    def __init__(
        self, task: Any, metric: str | None = None, max_new_tokens: int | None = None
    ) -> None:
        self._task = task
        self._max_new_tokens = max_new_tokens
        self.name = str(task.config.task)
        metadata = task.config.metadata or {}
        self.version = str(metadata.get("version", "0"))
        if task.OUTPUT_TYPE not in ("generate_until", "loglikelihood", "multiple_choice"):
            raise ValueError(
                f"task.names must name tasks of answers or choices, but {self.name} asks for"
                f" {task.OUTPUT_TYPE}; task=perplexity measures likelihoods of whole texts."
            )
        self.num_documents = len(task.eval_docs)
        self.metric, self._filter = self._chosen(metric)
        self._instances: dict[int, list[Any]] = {}

    @functools.cached_property
    def digest(self) -> str:
        """A digest of all its documents, 16 hex digits: a name does not say what its data are."""
        found = hashlib.sha256()
        for one in self._task.eval_docs:
            found.update(json.dumps(one, sort_keys=True, default=str).encode())
        return found.hexdigest()[:16]

    def _chosen(self, metric: str | None) -> tuple[str, Any]:
        """Return the metric's name and its filter."""
        filters = {one.name: one for one in self._task._filters}
        rules = self._task.aggregation()
        name, _, chosen = (metric or "").partition(",")
        name, chosen = name or next(iter(rules)), chosen or next(iter(filters))
        if name not in rules or chosen not in filters:
            known = ", ".join(f"{one},{other}" for one in rules for other in filters)
            raise ValueError(f"task.metric must be one of {known} of {self.name}, got {metric!r}.")
        rule = getattr(rules[name], "__name__", str(rules[name]))
        if rule != "mean" or not self._task.higher_is_better().get(name, True):
            raise ValueError(
                f"task.metric must be a mean of which more is better, but {name} of {self.name} is"
                f" {'a mean of which less is better' if rule == 'mean' else f'a {rule}'}."
            )
        return name, filters[chosen]

    def documents(self, number: int, seed: int) -> list[Document]:
        """Return documents, drawn without replacement, in their own order.

        Args:
            number: How many; all if there are fewer.
            seed: Seed of the draw.
        """
        numbers = draw(range(self.num_documents), number, seed, self.name)
        # Each draw goes on from the state of the last: from the seed it is the same each time.
        self._task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with _quiet(self.name):
            self._task.build_all_requests(samples=numbers)
        grouped: dict[int, list[Any]] = {}
        for one in self._task.instances:  # which counts the drawn documents alone
            grouped.setdefault(numbers[one.doc_id], []).append(one)
        self._instances = grouped
        return [self._document(place, own) for place, own in grouped.items()]

    def _document(self, place: int, instances: Sequence[Any]) -> Document:
        fields = instances[0].doc
        prefix = str(self._task.doc_to_prefix(fields) or "")
        requests = tuple(self._request(one, prefix) for one in instances)
        return Document(place, fields, requests, self._target(fields))

    def _request(self, instance: Any, prefix: str) -> Request:
        text, given = instance.args[:2]
        text = str(text)
        if not text.endswith(prefix):
            prefix = ""
        text = text[: len(text) - len(prefix)]
        if instance.request_type == "loglikelihood":
            # Blanks at the end of a prompt begin the continuation, as in lm-eval's own models.
            whole = text + prefix
            bare = whole.rstrip()
            return Request(bare, continuation=whole[len(bare) :] + str(given))
        from lm_eval.models.utils import normalize_gen_kwargs

        settings = normalize_gen_kwargs(dict(given), DEFAULT_NEW_TOKENS)
        if settings.get("do_sample") and settings.get("temperature", 0.0) > 0:
            raise ValueError(
                f"answers are decoded greedily, but {self.name} samples them at a temperature of"
                f" {settings['temperature']}; set do_sample: false in a YAML of your own."
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        return Request(
            text,
            prefix,
            until=tuple(one for one in stops if one),
            max_new_tokens=self._max_new_tokens or int(settings["max_gen_toks"]),
        )

    def _target(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the right answer in words; the choice itself if the task numbers its choices."""
        target = self._task.doc_to_target(fields)
        targets = list(target) if isinstance(target, list | tuple) else [target]
        choices = (
            self._task.doc_to_choice(fields)
            if self._task.config.doc_to_choice is not None
            else None
        )
        if choices is not None:
            targets = [choices[one] if isinstance(one, int) else one for one in targets]
        return tuple(map(str, targets))

    def score(self, place: int, responses: Sequence[str | tuple[float, bool]]) -> float:
        """Return the metric of a document, 0 to 100.

        Args:
            place: The document's number.
            responses: For each of its requests the answer, or the continuation's log-likelihood in
                nats and whether each of its tokens is the likeliest.

        Raises:
            ValueError: If the metric is not between 0 and 1, or cannot be computed.
        """
        own = self._instances[place]
        for instance, response in zip(own, responses, strict=True):
            instance.resps = [response]
        self._filter.apply(own)
        found = [one.filtered_resps[self._filter.name] for one in own]
        try:
            value = float(self._task.process_results(own[0].doc, found)[self.metric])
        except Exception as error:  # a task's own code, of which nothing is known
            raise ValueError(
                f"{self.metric} of {self.name} must be computable from an answer, but document"
                f" {place} gave {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from None
        if not 0 <= value <= 1:
            raise ValueError(
                f"task.metric must be a share from 0 to 1, but {self.metric} of {self.name} is"
                f" {value:g} at document {place}."
            )
        return 100.0 * value


T = TypeVar("T")


def draw(items: Sequence[T], number: int, seed: int, name: str) -> list[T]:
    """Return items of a task, drawn without replacement, in their own order.

    Args:
        items: All of them.
        number: How many; all if there are fewer.
        seed: Seed of the draw.
        name: The task's name, so that two tasks do not draw the same places.
    """
    places = range(len(items))
    drawn = random.Random(f"{seed}-{name}").sample(places, min(number, len(places)))
    return [items[place] for place in sorted(drawn)]


def load(
    names: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    metric: str | None = None,
    max_new_tokens: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    revisions: Mapping[str, str] | None = None,
) -> list[EvalTask]:
    """Return tasks of lm-eval by name.

    Args:
        names: Names of tasks, groups or tags.
        include_path: A folder with YAML files of one's own, which are found first.
        num_fewshot: Examples before each question; None for each task's own number.
        metric: As of `EvalTask`.
        max_new_tokens: As of `EvalTask`.
        metadata: What lm-eval hands to tasks that make or choose their own data.
        revisions: The revision of data sets on the hub, by name; of others it is the newest.

    Raises:
        ValueError: If lm-eval is not installed, a name is not known, or data cannot be read.
    """
    try:
        import lm_eval  # noqa: F401  optional, and slow to import
    except ImportError:
        raise ValueError(
            "task=lm_eval needs the package lm-eval, which is not installed: pip install"
            " 'topkbench[lm-eval]'."
        ) from None
    if num_fewshot is not None:
        check_whole("task.num_fewshot", num_fewshot, least=0)
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise ValueError(f"task.include_path must be a folder, got {include_path!r}.")
    manager = index(names, include_path, dict(metadata or {}))
    found: dict[str, EvalTask] = {}
    revisions = revisions or {}
    read: set[str] = set()
    for name in names:
        with _quiet(name), _pinned(revisions, read):
            loaded = manager.load([name])["tasks"]
        for task in loaded.values():
            if num_fewshot is not None:
                task.set_config(key="num_fewshot", value=num_fewshot)
            one = EvalTask(task, metric, max_new_tokens)
            found[one.name] = one
    for name in revisions:
        if name not in read:
            known = ", ".join(sorted(read)) or "none"
            raise ValueError(
                f"task.revisions must name data sets that the tasks read ({known}), got {name!r}."
            )
    return list(found.values())


def index(names: Sequence[str], include_path: str | None, metadata: dict[str, Any]) -> Any:
    """Return lm-eval's index, of few folders if they hold the names: of all it takes 15 seconds."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    own = [str(OWN_TASKS)]
    if include_path is not None:
        own.append(str(Path(include_path).expanduser()))
    folder = Path(lm_eval.tasks.__file__).parent
    near = [
        str(one)
        for one in sorted(folder.iterdir())
        if one.is_dir() and any(name.startswith(one.name) for name in names)
    ]
    tried: list[Any] = []
    # Of two tasks of one name lm-eval keeps that of the later folder.
    for paths, every in ((own, False), ([*near, *own], False), (own, True)):
        with _quiet(", ".join(names)):
            manager = TaskManager(
                include_path=list(paths), include_defaults=every, metadata=metadata
            )
        if all(name in manager.task_index for name in names):
            return manager
        tried.append(manager)
    unknown = next(name for name in names if name not in tried[-1].task_index)
    near_names = difflib.get_close_matches(unknown, tried[-1].task_index, n=3)
    hint = f"; did you mean {', '.join(near_names)}?" if near_names else "."
    raise ValueError(
        f"task.names must name tasks, groups or tags of lm-eval, or of task.include_path, got"
        f" {unknown!r}{hint}"
    )


@contextlib.contextmanager
def _pinned(revisions: Mapping[str, str], seen: set[str]) -> Iterator[None]:
    """Within the block data sets are read from the hub by the given revisions.

    What is read is added to ``seen``.

    A task's file may say a revision itself; there is no other way to give lm-eval one, since the
    functions with which some tasks read their data pass none on.
    """
    import datasets

    read = datasets.load_dataset

    @functools.wraps(read)
    def of_revision(path: str, *given: Any, **settings: Any) -> Any:
        seen.add(path)
        if path in revisions:
            settings["revision"] = revisions[path]
        try:
            return read(path, *given, **settings)
        except datasets.exceptions.DatasetGenerationError as error:
            place = _broken_json(settings.get("data_files")) if path == "json" else None
            raise type(error)(place or str(error.__cause__ or error)) from error

    datasets.load_dataset = of_revision
    try:
        yield
    finally:
        datasets.load_dataset = read


def _broken_json(files: Any) -> str | None:
    """Return what is wrong with local files of JSON lines, with file and line; None if nothing.

    Args:
        files: A file, or a list or mapping of such, as ``datasets`` takes them.
    """
    if isinstance(files, Mapping):
        files = list(files.values())
    if isinstance(files, list | tuple):
        return next(filter(None, map(_broken_json, files)), None)
    path = Path(str(files))
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    # A list is one value over many lines.
    parts = [text] if text.lstrip().startswith("[") else text.split("\n")
    for number, part in enumerate(parts):
        try:
            if part.strip():
                json.loads(part)
        except json.JSONDecodeError as error:
            return f"{path} must be JSON, but line {number + error.lineno} is not: {error.msg}."
    return None


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Within the block lm-eval prints nothing, and what it raises is one sentence."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Its bars of progress are written to standard error.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # of lm-eval, of datasets, or of a task's own code
        if (package := _missing_package(error)) is not None:
            raise ValueError(
                f"task.names={name} needs the package {package}, which is not installed; install"
                " topkbench[lm-eval], or the package itself if that does not bring it."
            ) from None
        raise ValueError(
            f"task.names={name} must be a task of lm-eval whose data can be read, but got"
            f" {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None
    finally:
        logger.setLevel(level)


def _missing_package(error: BaseException | None) -> str | None:
    """Return the package for lack of which an error was raised; None if that was not the reason."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name
        error = error.__cause__ or error.__context__
    return None


def question_place(text: str, fields: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return where the question of a prompt begins, in characters; None if that is not found.

    It begins where the last of the named fields begins that occur in the prompt.

    Args:
        text: The prompt.
        fields: The document.
        names: The fields that may hold the question.
    """
    places = [-1]
    for name in names:
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            places.append(text.rfind(value.strip()))
    place = max(places)
    return place if place > 0 else None


def middle_out(ids: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """Return the first and the last tokens of a prompt that is too long, as LongBench does.

    Args:
        ids: Its tokens.
        most: How many are kept; half of them, rounded down, from either end.
    """
    half = most // 2
    return list(ids[:half]), list(ids[len(ids) - half :]) if half else []
