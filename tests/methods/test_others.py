"""Exact top-k, Loki, Quest, StreamingLLM and full attention, by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.learning import check_ready
from topkbench.methods.loki import Loki
from topkbench.methods.quest import Quest
from topkbench.methods.streaming_llm import StreamingLLM

Score = Callable[..., Tensor]
LLAMA = Geometry(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
FREE = {"num_sink": 0, "num_recent": 0}


def prefill(keys: Tensor, capacity: int, kv_start: Tensor | None = None) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys,
        value_states=keys,
        capacity=capacity,
        layer=0,
        num_layers=1,
        kv_start=kv_start,
    )


def test_exact_ranks_by_summed_weights() -> None:
    # The first query puts nearly all weight on key 0; the second slightly prefers 1 to 2. Sums of
    # weights rank 0 first and 1 second; sums of logits would rank 1 behind 2.
    queries = torch.tensor([[8.0, 0.0], [0.0, 1.0]])[None, None]
    keys = torch.tensor([[1.0, 0.0], [-2.0, 0.5], [0.0, 0.0]])[None, None]
    method = ExactTopK()
    index = method.build_index(prefill(keys, 3))
    view, scale = CacheView(keys, keys), 2**-0.5
    step = method.step(index, StepContext(queries, view, Policy(k=2, **FREE), scale))
    assert step.selection is not None
    assert step.selection.indices.tolist() == [[[0, 1]]]
    logits = Policy(k=2, aggregation="sum_logit", **FREE)
    step = method.step(index, StepContext(queries, view, logits, scale))
    assert step.selection is not None
    assert step.selection.indices.tolist() == [[[0, 2]]]
    per_query = Policy(k=1, head_scope="query_head", **FREE)
    step = method.step(index, StepContext(queries, view, per_query, scale))
    assert step.selection is not None
    assert step.selection.indices.tolist() == [[[0], [1]]]


def test_exact_ranks_by_the_keys_of_the_steps_cache() -> None:
    """The index holds no keys: it was built over others."""
    keys = torch.zeros(1, 1, 3, 1)
    method = ExactTopK()
    index = method.build_index(prefill(keys, 4))
    method.append(index, keys[:, :, :1], keys[:, :, :1])
    cached = torch.tensor([0.0, 3.0, 1.0, 2.0])[None, None, :, None]
    view, policy = CacheView(cached, cached), Policy(k=2, **FREE)
    step = method.step(index, StepContext(torch.ones(1, 1, 1, 1), view, policy, 1.0))
    assert step.selection is not None
    assert step.selection.indices.tolist() == [[[1, 3]]]


def test_quest_extremes_by_hand(score: Score) -> None:
    keys = torch.tensor([[1.0, -1.0], [3.0, -5.0], [-2.0, 4.0], [0.0, 0.0], [7.0, 7.0]])[None, None]
    method = Quest(page_size=2)
    index = method.build_index(prefill(keys, 8))
    assert index.page_min[0, 0].tolist() == [[1, -5], [-2, 0], [7, 7], [0, 0]]
    assert index.page_max[0, 0].tolist() == [[3, -1], [0, 4], [7, 7], [0, 0]]
    method.append(index, torch.tensor([[[[8.0, -8.0]]]]), keys[:, :, :1])
    method.append(index, torch.tensor([[[[-1.0, 9.0]]]]), keys[:, :, :1])
    assert index.page_min[0, 0].tolist() == [[1, -5], [-2, 0], [7, -8], [-1, 9]]
    assert index.page_max[0, 0].tolist() == [[3, -1], [0, 4], [8, 7], [-1, 9]]
    # Query (2, -1): 2 * max of channel 0 minus the min of channel 1.
    query = torch.tensor([[[[2.0, -1.0]]]])
    assert score(method, index, query, keys).tolist() == [[[11.0, 0.0, 24.0, -11.0]]]


def test_quest_pages_begin_at_the_first_token_of_a_row() -> None:
    keys = torch.arange(6.0)[None, None, :, None].expand(2, -1, -1, -1)
    start = torch.tensor([0, 3], dtype=torch.int32)
    index = Quest(page_size=2).build_index(prefill(keys, 8, start))
    assert index.page_min[:, 0, :, 0].tolist() == [[0, 2, 4, 0], [3, 5, 0, 0]]
    assert index.page_max[:, 0, :, 0].tolist() == [[1, 3, 5, 0], [4, 5, 0, 0]]
    pages = index.page_count()
    assert pages is not None
    assert pages.tolist() == [3, 2]


def test_quest_bound_is_never_below_a_logit(score: Score) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 50, 8, generator=generator)
    queries = torch.randn(1, 2, 3, 8, generator=generator)
    queries[..., 2] = 0.0
    method = Quest(page_size=7)
    index = method.build_index(prefill(keys, 50))
    bound = score(method, index, queries, keys, head_scope="query_head")
    logits = queries @ keys.mT
    for page in range(8):
        inside = logits[..., page * 7 : page * 7 + 7].amax(-1)
        assert (bound[..., page] >= inside - 1e-5).all()
    # A group's queries are ranked by the sum of their bounds, or by softmaxes of each one's.
    torch.testing.assert_close(score(method, index, queries, keys), bound.sum(2))
    apart = score(method, index, queries, keys, aggregation="sum_softmax")
    torch.testing.assert_close(apart, bound)


def test_quest_with_pages_of_one_is_exact(score: Score) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 11, 8, generator=generator)
    queries = torch.randn(1, 2, 3, 8, generator=generator)
    method = Quest(page_size=1)
    index = method.build_index(prefill(keys, 11))
    found = score(method, index, queries, keys, head_scope="query_head")
    torch.testing.assert_close(found, queries @ keys.mT)


@pytest.mark.parametrize(
    ("k", "sinks", "recents", "wanted"),
    [
        (16, 4, 8, [3]),  # a budget of one page: the page being filled
        (5, 0, 0, [2]),  # below one page: still one page
        (32, 4, 8, [0, 3]),
        (48, 4, 8, [0, 2, 3]),
        (47, 4, 8, [0, 3]),
        (32, 0, 0, [1, 2]),
        (33, 0, 8, [2, 3]),
    ],
)
def test_quest_budget_is_whole_pages(k: int, sinks: int, recents: int, wanted: list[int]) -> None:
    # 60 tokens in pages of 16; all keys of a page are equal and score 0, 5, 9, -1.
    keys = torch.tensor([0.0, 5.0, 9.0, -1.0]).repeat_interleave(16)[None, None, :60, None]
    query = torch.ones(1, 1, 1, 1)
    method = Quest(page_size=16)
    index = method.build_index(prefill(keys, 60))
    policy = Policy(k=k, num_sink=sinks if k >= 12 else 0, num_recent=recents if k >= 12 else 0)
    step = method.step(index, StepContext(query, CacheView(keys, keys), policy, 1.0))
    assert step.selection is not None
    assert step.selection.indices.tolist() == [[wanted]]
    read = step.selection.tokens_read(CacheView(keys, keys))
    assert read.tolist() == [[16 * len(wanted) - (4 if 3 in wanted else 0)]]


def test_quest_page_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        Quest(page_size=0)


class Line:
    """Keys on a line of direction (3, 4) around a distant mean, with a little orthogonal noise."""

    num_layers = 1
    sequences = 2

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        place = torch.tensor([-2.0, -1.0, 1.0, 2.0])[:, None]
        along, beside = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, -0.6]])
        noise = torch.tensor([0.1, -0.1, -0.1, 0.1])[:, None]
        keys = 100.0 + place * along + noise * beside
        return [(keys[None], keys[None]), (keys[None], keys[None])]


def test_loki_components_by_hand() -> None:
    tensors = Loki().fit(Line())
    # Centred: around the mean of 100 the strongest direction is the line's, not the mean's.
    components = tensors["components"][0, 0]
    torch.testing.assert_close(components[:, 0], torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)
    torch.testing.assert_close(components[:, 1], torch.tensor([0.8, -0.6]), atol=1e-5, rtol=0)
    torch.testing.assert_close(tensors["mean"], torch.full((1, 1, 2), 100.0))
    torch.testing.assert_close(tensors["variance"], torch.tensor([[[2.5, 0.01]]]))


def test_loki_scores_with_its_leading_channels(score: Score) -> None:
    method = Loki(rank=1)
    method.load_artifact(method.fit(Line()))
    keys = torch.tensor([[3.0, 4.0], [4.0, -3.0], [0.6, 0.8]])[None, None]
    index = method.build_index(prefill(keys, 5))
    assert index.low_keys.shape == (1, 1, 5, 1)
    found = score(method, index, torch.tensor([[[[1.2, 1.6]]]]), keys)
    torch.testing.assert_close(found, torch.tensor([[[[10.0, 0.0, 2.0]]]]), atol=1e-4, rtol=0)


def test_loki_of_full_rank_is_exact(score: Score) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 9, 2, generator=generator)
    queries = torch.randn(1, 1, 3, 2, generator=generator)
    method = Loki(rank=2)
    method.load_artifact(method.fit(Line()))
    index = method.build_index(prefill(keys, 9))
    found = score(method, index, queries, keys)
    torch.testing.assert_close(found, queries @ keys.mT, atol=1e-5, rtol=1e-5)


def test_loki_refuses_bad_settings_and_artifacts() -> None:
    geometry = Geometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2)
    with pytest.raises(ValueError, match="rank must be at most head_dim=2, got 3"):
        check_ready(Loki(rank=3), geometry)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Loki(rank=0)
    with pytest.raises(ValueError, match=r"components \[L, Hkv, d, d\], got none"):
        Loki().load_artifact({})
    method = Loki(rank=1)
    with pytest.raises(ValueError, match="got no artifact"):
        method.build_index(prefill(torch.zeros(1, 1, 3, 2), 3))
    method.load_artifact(method.fit(Line()))
    with pytest.raises(ValueError, match=r"= \[1, 2, 2, 2\], got \[1, 1, 2, 2\]; fit them"):
        method.build_index(prefill(torch.zeros(1, 2, 3, 2), 3))


@pytest.mark.parametrize(
    ("k", "num_sink", "wanted"),
    [
        (6, 4, [0, 1, 2, 3, 8, 9]),
        (5, 0, [5, 6, 7, 8, 9]),
        (4, 4, [0, 1, 2, 3]),
        (9, 2, [0, 1, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_streaming_llm_keeps_both_ends(k: int, num_sink: int, wanted: list[int]) -> None:
    keys = torch.zeros(1, 2, 10, 2)
    method = StreamingLLM()
    index = method.build_index(prefill(keys, 10))
    policy = Policy(k=k, num_sink=num_sink, num_recent=0)
    step = method.step(
        index, StepContext(torch.zeros(1, 2, 3, 2), CacheView(keys, keys), policy, 1.0)
    )
    assert step.selection is not None
    assert step.selection.indices.tolist() == [[wanted, wanted]]
    assert step.ranking is None


def test_streaming_llm_of_a_padded_batch() -> None:
    keys = torch.zeros(3, 1, 10, 2)
    start = torch.tensor([0, 3, 8], dtype=torch.int32)
    method = StreamingLLM()
    index = method.build_index(prefill(keys, 10, start))
    policy = Policy(k=4, num_sink=1, num_recent=0)
    step = method.step(
        index, StepContext(torch.zeros(3, 1, 1, 2), CacheView(keys, keys, start), policy, 1.0)
    )
    assert step.selection is not None
    rows = step.selection.indices[:, 0].tolist()
    assert rows == [[0, 7, 8, 9], [3, 7, 8, 9], [8, 9, -1, -1]]


def test_full_attention_needs_no_index() -> None:
    keys = torch.tensor([0.0, 1.0, 2.0])[None, None, :, None]
    values = torch.tensor([6.0, 3.0, 1.0])[None, None, :, None]
    # At a scale of ln 2 the weights are 1, 2 and 4 sevenths.
    view, scale = CacheView(keys, values), math.log(2.0)
    step = FullAttention().step(
        None, StepContext(torch.ones(1, 1, 1, 1), view, Policy(k=12), scale)
    )
    torch.testing.assert_close(step.out, torch.tensor([[[16 / 7]]]))
    assert (step.selection, step.ranking) == (None, None)


def test_full_attention_refuses_an_unknown_backend() -> None:
    with pytest.raises(
        ValueError,
        match="one of auto, sdpa, cpu, triton, flash_attn, flash_attn_3, flashinfer, got 'eager'",
    ):
        FullAttention(backend="eager")  # type: ignore[arg-type]


def test_bytes_by_hand() -> None:
    """Half precision, 8 KV heads of 128 channels, 32,768 tokens, k=512."""
    token = 2 * 8 * 128 * 2
    for method, wanted in (
        (FullAttention(), 32768 * token),
        (ExactTopK(), 32768 * token // 2 + 512 * token),
        (Quest(), 2048 * token + 512 * token),
        (Loki(rank=32), 32768 * 8 * 32 * 2 + 8 * 128 * 32 * 4 + 512 * token),
        (StreamingLLM(), 512 * token),
    ):
        assert method.bytes_read(LLAMA, 32768, 512) == wanted
    assert Quest().index_bytes_per_token(LLAMA) == 8 * 128 * 2 * 2 / 16
