"""A question-answering cell: its rows, its samples, and what each pass measures."""

import json
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from topkbench.analysis.record.kept_file import unpacked
from topkbench.harness.cell import run_cell
from topkbench.harness.generation import GenerationTask
from topkbench.harness.samples import Sample
from topkbench.harness.task import Context, Outcome
from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods import base
from topkbench.methods.base import AnyMethod, Geometry, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.ruler_words import RulerWords

ROOT = Path(__file__).resolve().parents[2]
QUALITY = ("recall_at_k", "attention_mass", "output_rel_error")


SETTINGS = {"length": 200, "num_samples": 2, "subtasks": ("niah_single", "vt")}


def run(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, method: AnyMethod, **knobs: Any
) -> Outcome:
    task = RulerWords(**{**SETTINGS, "cache_dir": str(tmp_path), **knobs})  # type: ignore[arg-type]
    policy = Policy(k=24, num_sink=0, num_recent=0)
    context = Context(loaded, store, method, policy, FullAttention(), bandwidth=1e9)
    return run_cell(context, task)


def test_a_budget_is_followed_to_the_selection_through_few_files(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: set[tuple[str, ...]] = set()

    def watched(*args: Any, **kwargs: Any) -> Any:
        entered = [Path(frame.filename).resolve() for frame in traceback.extract_stack()]
        inside = [path for path in entered if path.suffix == ".py" and path.is_relative_to(ROOT)]
        own = [path for path in inside if "tests" not in path.parts]
        walks.add(tuple(dict.fromkeys(path.relative_to(ROOT).as_posix() for path in own)))
        return topk_select(*args, **kwargs)

    monkeypatch.setattr(base, "topk_select", watched)
    run(loaded, store, tmp_path, ExactTopK(), timed_prompts=0, judged_prompts=0)
    # A command begins in harness/main.py and runner.py, which stand where harness/cell.py does.
    assert walks == {
        (
            *("harness/cell.py", "harness/sweep.py", "harness/generation.py"),
            *("harness/decoding.py", "models/compat.py", "models/attach.py", "models/steps.py"),
            "methods/base.py",
        )
    }


def test_a_cell_has_a_row_per_subtask_and_their_mean(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    outcome = run(loaded, store, tmp_path, ExactTopK())
    names = [(row.subtask, row.values["num_samples"], row.status) for row in outcome.rows]
    assert names == [("niah_single", 2, "ok"), ("vt", 2, "ok"), ("mean", 4, "ok")]
    mean = outcome.rows[-1].values
    scores = [one["score"] for one in outcome.samples]
    assert mean["score"] == pytest.approx(sum(scores) / 4)
    assert mean["recall_at_k"] == pytest.approx(1.0)
    assert (mean["judged_prompts"], mean["timed_prompts"]) == (4, 3)
    assert 0 < mean["attention_mass"] < 1
    # About 190 tokens are cached, of which 24 are read.
    assert mean["density"] == pytest.approx(24 / 190, abs=0.02)
    for column in ("prefill_ms", "build_ms", "decode_ms_p50", "score_ms", "select_ms", "attend_ms"):
        assert mean[column] > 0
    assert mean["decode_ms_p20"] <= mean["decode_ms_p50"] <= mean["decode_ms_p80"]
    assert mean["tokens_per_s"] == pytest.approx(1e3 / mean["decode_ms_p50"])
    assert mean["speedup_vs_full"] == mean["full_ms_p50"] / mean["decode_ms_p50"]
    # Even if few prompts are timed, there are enough pairs of turns for an interval.
    assert mean["speedup_ci_low"] <= mean["speedup_vs_full"] <= mean["speedup_ci_high"]
    # 2 layers; each reads every key to score (2 heads of 16 channels of 4 bytes), then 24 tokens.
    n = mean["kv_len"]
    assert mean["bytes_read_per_step"] == 2 * (n * 2 * 16 * 4 + 24 * 2 * 2 * 16 * 4)
    stages = ("encode_ms", "append_ms", "score_ms", "select_ms", "attend_ms")
    attention = sum(mean[stage] or 0.0 for stage in stages) * 1e-3
    assert mean["bandwidth_fraction"] == pytest.approx(
        mean["bytes_read_per_step"] / attention / 1e9  # the context's bandwidth
    )
    assert store.forwards == 4


LONG = 1000


@dataclass(kw_only=True)
class LongAnswer(GenerationTask):
    """One question whose answer has a thousand tokens, since no token ends it."""

    question: Any = "dense"

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        return [
            Sample(
                sample_id="long",
                subtask="long",
                context="context " * 100,
                question=" question",
                answer_prefix="",
                answers=("a",),
                max_new_tokens=LONG,
                length=None,
            )
        ]


@pytest.fixture(scope="module")
def endless(loaded: LoadedModel, geometry: Geometry) -> LoadedModel:
    """A random model of the shape for which all methods are fitted, that never ends an answer."""
    config = LlamaConfig(
        vocab_size=len(loaded.tokenizer),
        hidden_size=geometry.num_heads * geometry.head_dim,
        intermediate_size=96,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight[:5] = 0.0  # its special tokens are never the likeliest
    return replace(loaded, model=model, window=2048)


# One of each kind of index; that of every method is checked over as many tokens by its contract.
@pytest.mark.parametrize("name", ["hata", "quest", "pqcache", "h2o"])
def test_a_thousand_tokens_are_generated_with_the_method_and_counted(
    endless: LoadedModel, make_method: Any, name: str
) -> None:
    method = make_method(name)
    policy = Policy(k=48, num_sink=2, num_recent=8, dense_layers=0)
    context = Context(endless, PrefillStore(endless.model), method, policy, FullAttention())
    task = LongAnswer(timed_prompts=0, judged_prompts=0)
    found = run_cell(context, task)
    mean = found.rows[-1].values
    (sample,) = found.samples
    assert (sample["num_generated"], sample["is_cut"]) == (LONG, True)
    begin = sample["length"]
    cached = sum(range(begin + 1, begin + LONG))
    # All steps but that of the answer's first token, which the prefill predicts.
    assert mean["sparse_step_share"] == 1.0
    read = 48 * (LONG - 1) / cached
    if name == "quest":  # whole pages, the last of which may be partly filled
        assert 0.8 * read < mean["density"] <= read
    else:
        assert mean["density"] == pytest.approx(read)


def test_freeing_tokens_changes_no_answer_and_reduces_the_reported_cache(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    masked = run(loaded, store, tmp_path, H2O())
    compact = run(loaded, store, tmp_path, H2O(mode="compact"))
    answers = [[one["tokens"] for one in outcome.samples] for outcome in (masked, compact)]
    assert answers[0] == answers[1]
    masked_row, compact_row = masked.rows[-1].values, compact.rows[-1].values
    assert compact_row["density"] == pytest.approx(masked_row["density"])
    # 2 layers of 2 heads of 16 channels: 24 tokens, and 32 slots that are filled until tokens are
    # freed again.
    assert compact_row["kv_cache_mib"] == 2 * 2 * 2 * 16 * 4 * (24 + 32) / 2**20
    assert masked_row["kv_cache_mib"] > 4 * compact_row["kv_cache_mib"]
    assert {"recall_at_k": 0.5, **compact_row}["recall_at_k"] == 0.5  # the row has no recall
    assert masked_row["recall_at_k"] > 0


def test_samples_contain_what_re_scoring_needs(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    outcome = run(loaded, store, tmp_path, FullAttention())
    ids = [one["sample_id"] for one in outcome.samples]
    assert ids == ["niah_single-200-0-0", "niah_single-200-0-1", "vt-200-0-0", "vt-200-0-1"]
    for one in outcome.samples:
        assert one["num_generated"] == len(one["tokens"])
        decoded = loaded.tokenizer.decode(one["tokens"], skip_special_tokens=True)
        assert one["prediction"] == decoded
        assert one["references"]
    asked = [one["question_text"] for one in outcome.samples]
    assert asked[2] == "Which variables hold the value 79531?"


@pytest.mark.parametrize("method", [ExactTopK(), H2O()])  # together, and one token by one
def test_the_tokens_that_heads_kept_are_recorded_of_a_few_prompts(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, method: AnyMethod
) -> None:
    outcome = run(loaded, store, tmp_path, method, timed_prompts=0, kept_prompts=3)
    names = [one["sample_id"] for one in outcome.kept]
    assert names == ["niah_single-200-0-0", "niah_single-200-0-1", "vt-200-0-0"]
    full = run(loaded, store, tmp_path, FullAttention(), timed_prompts=0)
    assert full.kept == []
    prompts = {one.sample.sample_id: one for one in RulerWords(**SETTINGS).tokenised(loaded)}  # type: ignore[arg-type]
    for one in outcome.kept:
        slots = unpacked(one["kept"], one["heads"], one["cached"])
        assert (one["layers"], one["heads"], len(slots)) == ([0, 1], [2, 2], 4)
        assert slots.sum(1).tolist() == [24] * 4
        # The step is the last of the question and of 16 tokens of full attention's answer.
        prompt = prompts[one["sample_id"]]
        (answer,) = (
            sample["tokens"] for sample in full.samples if sample["sample_id"] == one["sample_id"]
        )
        ids = [*prompt.prefill_ids, *prompt.decode_ids, *answer[:16]]
        assert one["cached"] == len(ids)
        texts = json.loads(one["texts"])
        assert len(texts) == len(ids)
        assert "".join(texts) == loaded.tokenizer.decode(ids)
    assert run(loaded, store, tmp_path, method, timed_prompts=0, kept_prompts=0).kept == []


def test_full_attention_has_no_selection_quality(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    mean = run(loaded, store, tmp_path, FullAttention(), num_samples=1).rows[-1].values
    assert [mean.get(name) for name in QUALITY] == [None, None, None]
    assert (mean.get("judged_prompts"), mean["timed_prompts"]) == (None, 2)
    assert mean["density"] == 1.0
    assert mean["speedup_vs_full"] is None
    assert mean["full_backend"] == "sdpa"
    assert mean["attend_ms"] > 0
    assert mean["bytes_read_per_step"] == 2 * mean["kv_len"] * 2 * 2 * 16 * 4
