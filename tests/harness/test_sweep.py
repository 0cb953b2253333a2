"""Cells over the same prompts: each prompt is prefilled once, and what was measured is kept."""

import functools
import gc
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from torch import OutOfMemoryError, Tensor

from topkbench.analysis.record import journal as journal_module
from topkbench.analysis.record.journal import Claims, DisagreementError, GivenUpError, Journal
from topkbench.analysis.record.store import PartStore
from topkbench.harness.batch_size import most_prompts, recorded
from topkbench.harness.cell import run_cell
from topkbench.harness.decoding import Prompt
from topkbench.harness.parts import MeasuredPart, same_records
from topkbench.harness.runner import JournaledCell
from topkbench.harness.sweep import Plan, PromptCell, Record, run_by_prompts
from topkbench.harness.task import Context, Outcome, TaskRow
from topkbench.methods.base import AnyMethod, Policy, kv_bytes
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.quest import Quest
from topkbench.methods.snapkv import SnapKV
from topkbench.models.attach import geometry_of
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import Prefill, prefill
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.ruler_words import RulerWords

METHODS: list[AnyMethod] = [ExactTopK(), Quest(page_size=4), H2O()]
BUDGETS = (16, 24, 32, 40)


def task(folder: Path, **settings: Any) -> RulerWords:
    given = {"length": 170, "num_samples": 2, "subtasks": ("niah_single", "vt"), "batch_size": 2}
    more = {"timed_prompts": 0, "judged_prompts": 3, "cache_dir": str(folder), "question": "dense"}
    return RulerWords(**{**given, **more, **settings})  # type: ignore[arg-type]


def context(loaded: LoadedModel, store: PrefillStore, method: AnyMethod, k: int) -> Context:
    return Context(loaded, store, method, Policy(k=k, num_sink=1, num_recent=2), FullAttention())


def cells_of(
    loaded: LoadedModel,
    store: PrefillStore,
    made: RulerWords,
    methods: Sequence[AnyMethod] = METHODS,
    budgets: Sequence[int] = BUDGETS,
) -> list[PromptCell]:
    prompts = made.tokenised(loaded)
    given = [(FullAttention(), 16), *((method, k) for method in methods for k in budgets)]
    contexts = [context(loaded, store, method, k) for method, k in given]
    return [PromptCell.of(one, made, prompts) for one in contexts]


def without_times(outcome: Outcome) -> list[Any]:
    """Return rows and samples without what varies from run to run."""
    samples = [{**one, "prefill_ms": None} for one in outcome.samples]
    return [outcome.rows, samples]


@pytest.fixture
def counted(loaded: LoadedModel) -> tuple[PrefillStore, WeakSet[Any], list[int]]:
    """A store, the states that are alive, and their number after each prefill."""
    alive: WeakSet[Any] = WeakSet()
    numbers: list[int] = []

    def compute(model: Any, token_ids: Sequence[int], needs: frozenset[str]) -> Prefill:
        made = prefill(model, token_ids, needs)
        alive.add(made.logits)
        numbers.append(len(alive))
        return made

    return PrefillStore(loaded.model, compute=compute), alive, numbers


def test_prompts_are_prefilled_once_and_dropped_after_their_batch(
    loaded: LoadedModel,
    tmp_path: Path,
    counted: tuple[PrefillStore, WeakSet[Any], list[int]],
) -> None:
    """Three methods by four budgets on six prompts, in batches of at most two."""
    store, alive, numbers = counted
    cells = cells_of(loaded, store, task(tmp_path, num_samples=3, judged_prompts=0))
    run_by_prompts(cells, store)
    assert store.forwards == 6
    assert max(numbers) == 2
    gc.collect()
    assert len(alive) == 0
    assert len(cells) == 13
    for cell in cells:
        assert [row.subtask for row in cell.result().rows] == ["niah_single", "vt", "mean"]


def test_a_cell_in_a_sweep_equals_the_cell_alone(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    made = task(tmp_path, question="sparse")
    methods = [ExactTopK(), SnapKV(window=8), H2O(mode="compact")]
    cells = cells_of(loaded, store, made, methods, BUDGETS[:2])
    run_by_prompts(cells, store)
    for cell in cells:
        own = PrefillStore(loaded.model)
        again = context(loaded, own, cell.context.method, cell.context.policy.k)
        assert without_times(run_cell(again, made)) == without_times(cell.result())


def live_bytes() -> int:
    """Return the bytes of all tensors that are alive, each storage once."""
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if type(one) is Tensor
    }
    return sum(storages.values())


def note_live_bytes(seen: list[int]) -> None:
    seen.append(live_bytes())


def test_memory_grows_neither_with_prompts_nor_with_cells(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    """The most that a batch holds, at three sizes of a sweep."""
    most: list[int] = []
    for num_samples, num_cells in ((2, 2), (4, 2), (4, 4)):
        made = task(tmp_path, num_samples=num_samples, judged_prompts=0)
        store = PrefillStore(loaded.model)
        cells = cells_of(loaded, store, made)[:num_cells]
        before = live_bytes()
        seen = [before]
        run_by_prompts(cells, store, after=functools.partial(note_live_bytes, seen))
        states = sum(prompt_bytes(loaded, prompt) for prompt in cells[0].batches[0])
        most.append(max(seen) - before)
        assert states <= most[-1] < 2 * states
        assert live_bytes() - before < states / 20
    assert max(most) < 1.1 * min(most)


def prompt_bytes(loaded: LoadedModel, prompt: Prompt) -> int:
    """Return the bytes of a prompt's keys and values."""
    geometry = geometry_of(loaded.model)
    return geometry.num_layers * kv_bytes(geometry, len(prompt.prefill_ids))


# Memory that runs out -----------------------------------------------------------------------------


class Hungry(ExactTopK):
    """Runs out of memory with more than one prompt."""

    def score(self, *args: Any) -> Any:
        keys = args[2].cache.key_states
        if len(keys) > 1 and keys.stride(0):  # not the known tokens of one prompt
            raise OutOfMemoryError("a small device")
        return super().score(*args)


def test_a_batch_that_memory_is_short_for_is_halved_and_the_row_says_so(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    made = task(tmp_path, num_samples=3, batch_size=3)
    contexts = [context(loaded, store, one, 24) for one in (Hungry(), ExactTopK())]
    cells = [PromptCell.of(one, made, made.tokenised(loaded)) for one in contexts]
    run_by_prompts(cells, store)
    halved, whole = (cell.result() for cell in cells)
    assert [row.values["prompts_per_batch"] for row in halved.rows] == [1, 1, 1]
    assert [row.values["prompts_per_batch"] for row in whole.rows] == [3, 3, 3]
    assert [one["sample_id"] for one in halved.samples] == [
        one["sample_id"] for one in whole.samples
    ]
    single = task(tmp_path, num_samples=3, batch_size=1)
    alone = run_cell(context(loaded, store, ExactTopK(), 24), single)
    assert without_times(halved)[1] == without_times(alone)[1]


def test_a_prefill_that_memory_is_short_for_is_halved_for_all_cells(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    held: WeakSet[Any] = WeakSet()

    def compute(model: Any, token_ids: Sequence[int], needs: frozenset[str]) -> Prefill:
        if len(held) >= 2:
            raise OutOfMemoryError("a small device")
        made = prefill(model, token_ids, needs)
        held.add(made.logits)
        return made

    store = PrefillStore(loaded.model, compute=compute)
    made = task(tmp_path, num_samples=4, batch_size=4, judged_prompts=0)
    cells = cells_of(loaded, store, made)[:3]
    run_by_prompts(cells, store)
    for cell in cells:
        rows = cell.result().rows
        assert [row.values["prompts_per_batch"] for row in rows] == [2, 2, 2]
        assert [row.values["num_samples"] for row in rows] == [4, 4, 8]
    # In each sub-task two prompts, the third that memory is short for, and then all four.
    assert store.forwards == 2 * (3 + 4)


def test_a_prefill_that_fails_ends_the_cells_and_not_the_sweep(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    def compute(model: Any, token_ids: Sequence[int], needs: frozenset[str]) -> Prefill:
        raise OutOfMemoryError("a small device")

    store = PrefillStore(loaded.model, compute=compute)
    cells = cells_of(loaded, store, task(tmp_path))[:2]
    run_by_prompts(cells, store)
    for cell in cells:
        (row,) = cell.result().rows
        assert (row.status, row.reason) == ("out_of_memory", "a small device")


@pytest.mark.parametrize(
    ("free", "size"), [(0, 1), (199, 1), (400, 2), (799, 2), (800, 4), (10**9, 32)]
)
def test_a_batch_size_is_a_power_of_two_that_fits_half_of_the_memory(free: int, size: int) -> None:
    assert most_prompts(100, free) == size


def test_a_batch_size_is_chosen_once(tmp_path: Path) -> None:
    path = tmp_path / "batch_sizes" / "a.json"
    assert recorded(path, lambda: (100, 800)) == 4
    assert recorded(path, lambda: 1 / 0) == 4  # whatever is free later  # type: ignore[arg-type]
    path.write_text("{")
    assert recorded(path, lambda: (100, 400)) == 2


class Failing(ExactTopK):
    """Fails while it decodes the given number of prompts."""

    steps = 0

    def score(self, *args: Any) -> Any:
        type(self).steps += 1
        if type(self).steps > 5:
            raise RuntimeError("a kernel that breaks")
        return super().score(*args)


# The journal --------------------------------------------------------------------------------------


class Run:
    """What `JournaledCell.open` reads of a run."""

    def __init__(self, force: bool = False) -> None:
        self.settings = {"force": force}
        self.keys = {"answers": "1", "selections": "2", "speed": "3"}


class Runner:
    """What it asks a runner for: one object for each part."""

    is_worker = False

    def __init__(self, folder: Path) -> None:
        self.store = PartStore(folder)
        self.parts: dict[str, MeasuredPart] = {}

    def part(self, name: str, key: str, force: bool) -> MeasuredPart:
        if name not in self.parts:
            self.parts[name] = MeasuredPart(self.store, name, key, force)
        return self.parts[name]


@pytest.fixture
def open_cell(loaded: LoadedModel, store: PrefillStore, tmp_path: Path) -> Callable[..., Any]:
    def make(
        method: AnyMethod, force: bool = False, runner: Runner | None = None
    ) -> tuple[JournaledCell, Path]:
        made = task(tmp_path, num_samples=2)
        of_method = context(loaded, store, method, 24)
        cell = JournaledCell.of(of_method, made, made.tokenised(loaded))
        cell.open(Run(force), runner or Runner(tmp_path / "results"))  # type: ignore[arg-type]
        return cell, tmp_path / "results" / "parts"

    return make


def test_a_sweep_that_was_killed_goes_on_with_the_batch_that_it_was_at(
    open_cell: Callable[..., Any], store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = open_cell(ExactTopK())
    run_by_prompts([undisturbed], store)
    wanted = without_times(undisturbed.result())
    (killed, _) = open_cell(ExactTopK(), force=True)
    measured: list[tuple[str, int]] = []
    measure = RulerWords.measure

    def dies(self: Any, context: Any, plan: Any, part: str, prompts: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((part, len(prompts)))
        return measure(self, context, plan, part, prompts)

    monkeypatch.setattr(RulerWords, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        run_by_prompts([killed], store)
    assert len(measured) == 2
    (again, parts) = open_cell(ExactTopK())
    assert sum(map(len, again.records.values())) == 2
    measured.append(("", 0))  # goes on
    run_by_prompts([again], store)
    assert without_times(again.result()) == wanted
    assert again.reused == ["answers", "selections"]  # of both a batch was there
    assert undisturbed.reused == []
    assert len(measured) - 1 == sum(map(len, again.records.values())) == 4
    again.close()
    assert sorted(path.name for path in parts.iterdir()) == [
        "answers-1.json",
        "selections-2.json",
    ]
    found, _ = open_cell(ExactTopK())
    assert found.reused == ["answers", "selections"]
    assert without_times(found.result()) == wanted


def test_a_cell_that_fails_takes_no_further_part_and_the_others_go_on(
    open_cell: Callable[..., Any], loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    failing, _ = open_cell(Failing())
    made = failing.task
    other = PromptCell.of(context(loaded, store, Quest(page_size=4), 24), made, failing.prompts)
    run_by_prompts([failing, other], store)
    (row,) = failing.result().rows
    assert (row.status, row.values) == ("failed", {})
    # Each prompt fails by itself; the first is named.
    assert row.reason == "a kernel that breaks (answers of niah_single-170-0-0)"
    assert "Traceback" in failing.log
    assert [one.status for one in other.result().rows] == ["ok", "ok", "ok"]


def test_cells_that_share_a_part_measure_it_once(
    open_cell: Callable[..., Any], store: PrefillStore, tmp_path: Path
) -> None:
    runner = Runner(tmp_path / "results")
    one, _ = open_cell(ExactTopK(), runner=runner)
    other, _ = open_cell(ExactTopK(), runner=runner)
    run_by_prompts([one, other], store)
    assert (one.reused, other.reused) == ([], ["answers", "selections"])
    assert without_times(one.result()) == without_times(other.result())


def test_a_process_that_waited_finds_what_the_other_one_has_finished(
    open_cell: Callable[..., Any], store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, _ = open_cell(ExactTopK())
    quick, parts = open_cell(ExactTopK())
    run_by_prompts([quick], store)
    quick.close()
    assert sorted(path.suffix for path in parts.iterdir()) == [".json", ".json"]
    monkeypatch.setattr(RulerWords, "measure", lambda *given: 1 / 0)  # nothing is left to measure
    run_by_prompts([waiting], store)
    assert without_times(waiting.result()) == without_times(quick.result())
    assert waiting.reused == ["answers", "selections"]


def test_a_process_that_finds_other_results_makes_its_cell_wrong_and_goes_on(
    open_cell: Callable[..., Any], loaded: LoadedModel, store: PrefillStore
) -> None:
    cell, parts = open_cell(ExactTopK())
    made = cell.task
    healthy = PromptCell.of(context(loaded, store, Quest(page_size=4), 24), made, cell.prompts)
    measure, calls = type(made).measure, []

    def disturbed(self: Any, own: Context, plan: Any, part: str, prompts: Any) -> Any:
        calls.append(part)
        if len(calls) == 3:  # after exact's first answers
            (path,) = (parts / "answers-1").glob("*.jsonl")
            line = json.loads(path.read_text().strip().splitlines()[0])
            line["records"][0]["samples"][0]["tokens"] = [1]
            (parts / "answers-1" / "other-9.jsonl").write_text(json.dumps(line) + "\n")
        return measure(self, own, plan, part, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(made), "measure", disturbed)
        run_by_prompts([cell, healthy], store)
    (row,) = cell.result().rows
    assert (row.status, row.values) == ("wrong", {})
    assert "batch 0 was measured twice with different results" in row.reason
    assert [one.status for one in healthy.result().rows] == ["ok", "ok", "ok"]


def test_a_number_that_is_not_finite_fails_its_cell(
    open_cell: Callable[..., Any], store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, _ = open_cell(ExactTopK())
    measure = RulerWords.measure

    def not_finite(self: Any, own: Context, plan: Any, part: str, prompts: Any) -> Any:
        record = measure(self, own, plan, part, prompts)
        return {**record, "value": float("nan")} if part == "selections" else record

    monkeypatch.setattr(RulerWords, "measure", not_finite)
    run_by_prompts([cell], store)
    (row,) = cell.result().rows
    assert row.status == "failed"
    assert "(selections of niah_single-170-0-0 to niah_single-170-0-1)" in row.reason


def test_what_was_measured_twice_agrees_but_for_times_and_rounding() -> None:
    one = [{"samples": [{"tokens": [1], "prefill_ms": 1.0}], "count": {"read": 5.0}}]
    assert same_records(one, [{**one[0], "count": {"read": 5.0001}}])
    assert not same_records(one, [{**one[0], "count": {"read": 6.0}}])
    assert not same_records(one, [*one, *one])
    timed = [{"prompts": [{"turn_ms": {"full": [1.0]}}]}]
    assert same_records(timed, [{"prompts": [{"turn_ms": {"full": [2.0]}}]}])
    # Which of two tokens with nearly equal scores a head kept may differ as rounding does.
    judged = [{"prompts": [{"recall_at_k": [[0.5]], "kept": {"kept": "eJw="}}]}]
    assert same_records(judged, [{"prompts": [{"recall_at_k": [[0.5]], "kept": {}}]}])


def test_a_prefill_that_kills_its_process_is_given_up_and_ends_the_batchs_cells(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(tmp_path / "claims")
    for _ in range(3):
        killed = os.fork()
        if killed == 0:
            with claims.prefilling(0):
                os._exit(9)
        os.waitpid(killed, 0)
    store = PrefillStore(loaded.model)
    cells = cells_of(loaded, store, task(tmp_path))[:2]
    run_by_prompts(cells, store, claims.claim, claims.prefilling)
    for cell in cells:
        (row,) = cell.result().rows
        assert row.status == "out_of_memory"
        assert "the process was killed 3 times while it measured this" in row.reason


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers-1", same_records)
    assert journal.read() == {}
    journal.append(0, [{"samples": [{"tokens": [1, 2]}]}])
    journal.append(3, [{"samples": []}])
    (path,) = (tmp_path / "answers-1").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert journal.read() == {0: [{"samples": [{"tokens": [1, 2]}]}]}
    journal.append(3, [{"samples": []}])
    assert sorted(journal.read()) == [0, 3]


def test_two_writers_must_agree(tmp_path: Path) -> None:
    journal = Journal(tmp_path, same_records)
    journal.append(1, [{"samples": [{"tokens": [1], "prefill_ms": 3.0}], "count": {"read": 1.0}}])
    record: Record = {"samples": [{"tokens": [1], "prefill_ms": 4.0}], "count": {"read": 1.0}}
    line = {"batch": 1, "records": [record]}
    (tmp_path / "other-7.jsonl").write_text(json.dumps(line) + "\n")
    assert sorted(journal.read()) == [1]
    record["samples"][0]["tokens"] = [2]
    (tmp_path / "other-7.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DisagreementError, match="batch 1 was measured twice with different"):
        journal.read()


@pytest.mark.parametrize(("oom_kills", "most"), [((5, 5, 5, 5), 3), ((5, 6, 7), 2)])
def test_what_kills_its_process_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oom_kills: tuple[int, ...], most: int
) -> None:
    """After three deaths, or two at which the system was out of memory."""
    journal = Journal(tmp_path, same_records)
    for count in oom_kills[:-1]:
        monkeypatch.setattr(journal_module, "oom_kills", lambda count=count: count)
        killed = os.fork()
        if killed == 0:
            with journal.measuring(4):
                os._exit(9)
        os.waitpid(killed, 0)
    monkeypatch.setattr(journal_module, "oom_kills", lambda: oom_kills[-1])
    message = f"the process was killed {most} times while it measured this, .*want of memory"
    with pytest.raises(GivenUpError, match=message), journal.measuring(4):
        pass
    with journal.measuring(4):  # the next command tries again
        pass


def test_a_batch_is_claimed_by_one_process(tmp_path: Path) -> None:
    one, other = Claims(tmp_path), Claims(tmp_path)
    with one.claim(0, False) as mine, other.claim(0, False) as its, other.claim(1, False) as free:
        assert (mine, its, free) == (True, False, True)
    with other.claim(0, True) as mine:
        assert mine


def test_a_process_that_waits_says_for_whom(tmp_path: Path) -> None:
    said: list[str] = []
    with Claims(tmp_path).claim(3, False):
        waiting = os.fork()
        if waiting == 0:
            reader = Claims(tmp_path, lambda text: (tmp_path / "said").write_text(text) and None)
            with reader.claim(3, True):
                os._exit(0)
        while not (tmp_path / "said").is_file():
            assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
        said.append((tmp_path / "said").read_text())
    assert os.waitpid(waiting, 0)[1] == 0
    assert re.fullmatch(
        rf"batch 3 is measured by process {os.getpid()} on \S+ since \S+: waiting for it", said[0]
    )


class FailsOn(RulerWords):
    """Fails on some prompts, whatever is decoded with them."""

    bad: frozenset[str] = frozenset()

    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        if self.bad & {prompt.sample.sample_id for prompt in prompts}:
            raise ArithmeticError("a prompt that cannot be decoded")
        return super().measure(context, plan, part, prompts)


class Placed(PromptCell):
    place = ""

    def outcome_of(self, error: Exception, place: str) -> Outcome:
        self.place = place
        return Outcome([TaskRow("mean", status="failed", reason=str(error))], [])


def test_a_cell_that_fails_in_a_batch_names_the_prompt(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    given = {"length": 170, "num_samples": 5, "subtasks": ("vt",), "batch_size": 5}
    made = FailsOn(**given, timed_prompts=0, judged_prompts=0, cache_dir=str(tmp_path))  # type: ignore[arg-type]
    prompts = made.tokenised(loaded)
    made.bad = frozenset({prompts[3].sample.sample_id})
    cell = Placed.of(context(loaded, store, ExactTopK(), 24), made, prompts)
    run_by_prompts([cell], store)
    assert cell.result().rows[0].status == "failed"
    assert cell.place == f"answers of {prompts[3].sample.sample_id}"
