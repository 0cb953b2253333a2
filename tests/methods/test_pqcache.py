"""PQCache: its codes, its centroids and its scores, by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from topkbench.methods import pqcache
from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.learning import check_ready
from topkbench.methods.pqcache import PQCache

Score = Callable[..., Tensor]
SHAPE = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=16, dtype_bytes=4)


def prefill(keys: Tensor, **given: Tensor) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys,
        value_states=keys,
        capacity=keys.shape[2] + 4,
        layer=0,
        num_layers=1,
        **given,  # type: ignore[arg-type]
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_clusters_of_each_part_by_hand(score: Score) -> None:
    # First channel near 0 or 10, second near -4 or 4: each is a part with two centroids.
    keys = torch.tensor([[0.0, -5.0], [1.0, -3.0], [9.0, 5.0], [11.0, 3.0]])[None, None]
    method = PQCache(parts=2, bits=1)
    index = method.build_index(prefill(keys))
    assert sorted(index.centroids[0, 0, 0, :, 0].tolist()) == [0.5, 10.0]
    assert sorted(index.centroids[0, 0, 1, :, 0].tolist()) == [-4.0, 4.0]
    queries = torch.tensor([[2.0, 1.0], [0.0, -1.0]])[None, None]
    scores = score(method, index, queries, keys)
    assert scores.tolist() == [[[[-3, -3, 24, 24], [4, 4, -4, -4]]]]
    newest = torch.tensor([[[[2.0, 9.0]]]])  # near 0.5 and 4
    method.append(index, newest, newest)
    scores = score(method, index, queries, keys)
    assert scores[0, 0, :, 4].tolist() == [5.0, -4.0]


def test_scores_are_exact_if_each_key_has_its_own_centroid(score: Score) -> None:
    queries, keys = random(2, 2, 3, 16), random(2, 2, 60, 16, seed=1)
    method = PQCache()
    index = method.build_index(prefill(keys))
    scores = score(method, index, queries, keys)
    torch.testing.assert_close(scores, queries @ keys.mT, atol=1e-5, rtol=1e-5)


def test_of_equal_centroids_the_lower_is_chosen() -> None:
    # Three keys for four centroids: the fourth starts as a copy of the first.
    keys = torch.tensor([3.0, -1.0, 8.0])[None, None, :, None]
    index = PQCache(parts=1, bits=2).build_index(prefill(keys))
    assert index.centroids.flatten().tolist() == [3.0, -1.0, 8.0, 3.0]
    assert index.key_codes[0, 0, :3, 0].tolist() == [0, 1, 2]


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random(1, 2, 300, 16)
    whole = PQCache(bits=4).build_index(prefill(keys))
    monkeypatch.setattr(pqcache, "CPU_BLOCK", 64 * 70)  # 300 tokens in blocks of 70
    blocks = PQCache(bits=4).build_index(prefill(keys))
    assert torch.equal(blocks.key_codes, whole.key_codes)
    torch.testing.assert_close(blocks.centroids, whole.centroids)


def test_centroids_are_the_means_of_their_keys() -> None:
    keys = random(1, 2, 500, 16)
    index = PQCache(bits=3, iterations=60).build_index(prefill(keys))
    for part in range(2):
        own = keys[0, 1, :, 8 * part : 8 * part + 8]
        centroids = index.centroids[0, 1, part]
        codes = index.key_codes[0, 1, :500, part].long()
        assert torch.equal(torch.cdist(own, centroids).argmin(1), codes)
        means = torch.stack([own[codes == code].mean(0) for code in range(8)])
        torch.testing.assert_close(centroids, means, atol=1e-4, rtol=1e-4)


def test_a_row_in_a_batch_equals_the_row_alone() -> None:
    keys = random(2, 2, 300, 16)
    start = torch.tensor([40, 0], dtype=torch.int32)
    end = torch.tensor([300, 210], dtype=torch.int32)
    keys[0, :, :40] = torch.nan
    together = PQCache(bits=4).build_index(prefill(keys, kv_start=start, kv_len=end))
    for row, own in ((0, keys[:1, :, 40:]), (1, keys[1:, :, :210])):
        alone = PQCache(bits=4).build_index(prefill(own))
        first, last = int(start[row]), int(end[row])
        torch.testing.assert_close(together.centroids[row], alone.centroids[0])
        held = alone.key_codes[0, :, : last - first]
        assert torch.equal(together.key_codes[row, :, first:last], held)


def test_the_native_window_is_a_share_of_the_budget() -> None:
    method = PQCache(native={"num_sink": 0, "num_recent": 0})
    for k, sinks, recents in ((512, 32, 256), (64, 16, 32), (3, 0, 1)):
        native = method.resolve(Policy(k=k, num_sink=0, num_recent=0, protocol="native"))[1]
        assert (native.num_sink, native.num_recent) == (sinks, recents)


def test_natively_the_softmax_is_over_the_candidates_only() -> None:
    """Two queries, one of which has nearly all of its weight on the sink; k is 4.

    Over the candidates, the second and third token, the queries' weights are 4/5, 1/5 and 1/3,
    2/3, with sums 17/15 and 13/15. Over all tokens the first query's are nearly zero, and the
    second's are 1/6 and 2/6. Natively a sink and two recents, including the current token, count
    towards k; the unified policy forces the same tokens here.
    """
    tokens = torch.tensor([[9.0, 0.0], [4.0, 1.0], [1.0, 2.0], [1.0, 1.0], [1.0, 1.0]])
    tokens[1:] = tokens[1:].log()
    keys = torch.full((2, 1, 6, 2), 7.0)  # the rows begin and end apart
    keys[0, 0, :5] = keys[1, 0, 1:] = tokens
    start, end = torch.tensor([[0, 1], [5, 6]], dtype=torch.int32)
    method = PQCache(parts=1, bits=3, native={"num_sink": 0, "num_recent": 0})
    index = method.build_index(prefill(keys[:, :, :5], kv_start=start, kv_len=end - 1))
    newest = tokens[4].expand(2, 1, 1, 2)
    method.append(index, newest, newest)
    queries = torch.eye(2).expand(2, 1, 2, 2)
    for policy, wanted in (
        (Policy(k=4, num_sink=0, num_recent=0, protocol="native"), [[0, 1, 3, 4], [1, 2, 4, 5]]),
        (Policy(k=4, num_sink=1, num_recent=2), [[0, 2, 3, 4], [1, 3, 4, 5]]),
    ):
        in_force = method.resolve(policy)[1]
        assert (in_force.num_sink, in_force.num_recent) == (1, 2)
        view = CacheView(keys, keys, start, end)
        step = method.step(index, StepContext(queries, view, in_force, 1.0))
        assert step.selection is not None
        assert step.selection.indices[:, 0].tolist() == wanted


def test_bytes_equal_the_reads_counted() -> None:
    """A byte per part of every key, the centroids and the selected tokens, counted."""
    queries, keys = random(1, 2, 3, 16), random(1, 2, 60, 16, seed=1)
    method = PQCache()
    index = method.build_index(prefill(keys))
    view = CacheView(keys, keys)
    step = method.step(index, StepContext(queries, view, Policy(k=16), 16**-0.5))
    assert step.selection is not None
    read = index.key_codes[:, :, : index.length].nbytes + index.centroids.nbytes
    read += int(step.selection.tokens_read(view).sum()) * 2 * 16 * 4
    assert method.bytes_read(SHAPE, 60, 16) == read


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="bits must be at most 8, as a code is one byte, got 9"):
        PQCache(bits=9)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        PQCache(iterations=0)
    with pytest.raises(ValueError, match=r"local_share must be a share from 0 to 0\.75, got 1"):
        PQCache(local_share=1)
    with pytest.raises(ValueError, match="parts must divide head_dim=16, got 3"):
        check_ready(PQCache(parts=3), SHAPE)
