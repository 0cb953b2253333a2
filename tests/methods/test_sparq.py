"""SparQ: its channels, its temperature and its mean value, by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from topkbench.methods import sparq
from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.learning import check_ready
from topkbench.methods.sparq import SparQ

Score = Callable[..., Tensor]
FREE = {"num_sink": 0, "num_recent": 0}


def prefill(keys: Tensor, values: Tensor | None = None, **given: object) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys,
        value_states=keys if values is None else values,
        capacity=keys.shape[2] + 4,
        layer=0,
        num_layers=1,
        **given,  # type: ignore[arg-type]
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_group_selects_its_channels_together() -> None:
    # |q| summed over the group: 4, 5, 6, 1. The first query alone would select channels 0 and 1.
    queries = torch.tensor([[3.0, -3.0, 1.0, 0.0], [-1.0, 2.0, 5.0, -1.0]])[None, None]
    keys = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, -1.0, 0.5, 9.0]])[None, None]
    method = SparQ(rank=2)
    index = method.build_index(prefill(keys))
    context = StepContext(queries, CacheView(keys, keys), Policy(k=1, **FREE), 1.0)
    encoded = method.encode(index, context)
    assert sorted(encoded.channels[0, 0].tolist()) == [1, 2]
    # |q|_1 / |q_r|_1 is 7 / 4 and 9 / 7, under a root; the products are -1, 3.5 and 12, 0.5.
    scores = method.score(encoded, index, context)
    wanted = [[-1 * 1.75**0.5, 3.5 * 1.75**0.5], [12 * (9 / 7) ** 0.5, 0.5 * (9 / 7) ** 0.5]]
    torch.testing.assert_close(scores, torch.tensor(wanted)[None, None])


def test_the_mean_value_gets_the_weight_of_the_tokens_not_selected() -> None:
    # Logits ln 1, ln 2, ln 5: the best alone has 5 / 8 of the softmax, the best two 7 / 8.
    keys = torch.tensor([1.0, 2.0, 5.0]).log()[None, None, :, None]
    values = torch.tensor([[0.0], [4.0], [8.0]])[None, None]
    method, query = SparQ(rank=1), torch.ones(1, 1, 1, 1)
    view = CacheView(keys, values)
    index = method.build_index(prefill(keys, values))
    one = method.step(index, StepContext(query, view, Policy(k=1, **FREE), 1.0))
    assert one.out.item() == pytest.approx(5 / 8 * 8 + 3 / 8 * 4)
    two = method.step(index, StepContext(query, view, Policy(k=2, **FREE), 1.0))
    assert two.out.item() == pytest.approx(7 / 8 * (2 * 4 + 5 * 8) / 7 + 1 / 8 * 4)
    without = SparQ(rank=1, mean_value=False).step(
        index, StepContext(query, view, Policy(k=1, **FREE), 1.0)
    )
    assert without.out.item() == 8.0


def test_the_remainders_weight_uses_the_layers_scale_and_softcap() -> None:
    keys = torch.tensor([1.0, -1.0])[None, None, :, None]
    query, values = torch.ones(1, 1, 1, 1), torch.tensor([1.0, -1.0])[None, None, :, None]
    index = SparQ(rank=1).build_index(prefill(keys, values, scale=2.0, softcap=0.5))
    view = CacheView(keys, values)
    step = SparQ(rank=1).step(index, StepContext(query, view, Policy(k=1, **FREE), 2.0, 0.5))
    assert step.selection is not None
    assert step.selection.remainder is not None
    logit = torch.tensor(0.5 * torch.tanh(torch.tensor(2.0 / 0.5)).item())
    lacking = 1 - torch.sigmoid(2 * logit)
    torch.testing.assert_close(step.selection.remainder.weight, lacking.reshape(1, 1))


def test_all_channels_are_exact_logits(score: Score) -> None:
    queries, keys = random(2, 2, 3, 8), random(2, 2, 11, 8, seed=1)
    method = SparQ(rank=8)
    index = method.build_index(prefill(keys))
    scores = score(method, index, queries, keys)
    torch.testing.assert_close(scores, queries @ keys.mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_scope", ["kv_head", "query_head"])
def test_constant_values_give_a_constant_output(head_scope: str) -> None:
    queries, keys = random(2, 2, 3, 8), random(2, 2, 40, 8, seed=1)
    values = torch.tensor([0.5, -2.0, 0.0, 3.0, 1.0, 1.0, 1.0, 7.0]).expand(2, 2, 40, 8)
    method = SparQ(rank=2)
    index = method.build_index(prefill(keys, values))
    policy = Policy(k=5, head_scope=head_scope, **FREE)  # type: ignore[arg-type]
    step = method.step(index, StepContext(queries, CacheView(keys, values), policy, 8**-0.5))
    assert step.selection is not None
    assert step.selection.remainder is not None
    assert (step.selection.remainder.weight > 0.05).all()
    torch.testing.assert_close(step.out, values[:, 0, :6])


def test_the_mean_counts_each_valid_token_once() -> None:
    keys, values = random(2, 1, 6, 4), random(2, 1, 6, 4, seed=1)
    values[0, :, :2] = torch.nan  # padding may hold anything
    start = torch.tensor([2, 0], dtype=torch.int32)
    end = torch.tensor([5, 4], dtype=torch.int32)
    method = SparQ()
    index = method.build_index(prefill(keys, values, kv_start=start, kv_len=end))
    newest = random(2, 1, 1, 4, seed=2)
    for _ in range(3):  # the same token repeatedly, as when a step is timed
        method.append(index, newest, newest)
        index.undo_append()
    method.append(index, newest, newest)
    wanted = torch.stack([values[0, :, 2:5].sum(1), values[1, :, :4].sum(1)]) + newest[:, :, 0]
    torch.testing.assert_close(index.value_sum, wanted)
    assert index.kv_len is not None
    assert index.kv_len.tolist() == [6, 5]
    torch.testing.assert_close(index.channel_keys[0, 0, :, 5], newest[0, 0, 0])


def test_a_short_row_has_no_remainder() -> None:
    queries, keys = random(2, 1, 2, 8), random(2, 1, 30, 8, seed=1)
    end = torch.tensor([30, 9], dtype=torch.int32)
    method = SparQ()
    index = method.build_index(prefill(keys, kv_len=end))
    step = method.step(
        index, StepContext(queries, CacheView(keys, keys, None, end), Policy(k=12), 8**-0.5)
    )
    assert step.selection is not None
    assert step.selection.remainder is not None
    weight = step.selection.remainder.weight
    assert (weight[0] > 0).all()
    assert (weight[1] == 0).all()


def test_the_native_window_is_a_share_of_the_budget() -> None:
    method = SparQ(native={"num_sink": 0, "num_recent": 0, "aggregation": "sum_logit"})
    native = method.resolve(Policy(k=70, protocol="native"))[1]
    assert (native.num_sink, native.num_recent, native.aggregation) == (0, 17, "sum_logit")
    unified = Policy(k=70)
    assert method.resolve(unified)[1] == unified
    whole = replace(method, local_share=1.0)
    assert whole.resolve(Policy(k=70, protocol="native"))[1].num_recent == 70


def test_bytes_equal_the_reads_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the channels, the mean and the selected tokens, counted in bytes."""
    queries, keys = random(1, 2, 3, 16), random(1, 2, 60, 16, seed=1)
    read = 0
    plain: Callable[..., Tensor] = sparq.channel_score

    def counted(
        query: Tensor, keys: Tensor, channels: Tensor, *args: object, **kwargs: object
    ) -> Tensor:
        nonlocal read
        read += channels.numel() * keys.shape[3] * keys.element_size()
        return plain(query, keys, channels, *args, **kwargs)

    monkeypatch.setattr(sparq, "channel_score", counted)
    method = SparQ(impl="reference")
    index = method.build_index(prefill(keys))
    view = CacheView(keys, keys)
    step = method.step(index, StepContext(queries, view, Policy(k=16), 16**-0.5))
    assert step.selection is not None
    tokens = int(step.selection.tokens_read(view).sum())
    read += index.value_sum.nbytes + tokens * 2 * 16 * 4
    shape = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=16, dtype_bytes=4)
    assert method.bytes_read(shape, 60, 16) == read
    assert method.index_bytes_per_token(shape) == 2 * 16 * 4


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        SparQ(rank=0)
    with pytest.raises(ValueError, match="local_share must be a share from 0 to 1, got 2"):
        SparQ(local_share=2)
    geometry = Geometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2)
    with pytest.raises(ValueError, match="rank must be at most head_dim=2, got 3"):
        check_ready(SparQ(rank=3), geometry)
