"""Double Sparsity: its statistics, channels and labels, by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods import double_sparsity
from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.double_sparsity import DoubleSparsity
from topkbench.methods.learning import check_ready
from topkbench.methods.twilight import Twilight

Score = Callable[..., Tensor]
FREE = {"num_sink": 0, "num_recent": 0}
SHAPE = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=16, dtype_bytes=4)
# Two query heads of one KV head: heavy are channels 1 and 3; 0 and 1; together 1 and 3.
MAGNITUDE = torch.tensor([[[0.0, 5.0, 1.0, 9.0], [3.0, 7.0, 2.0, 1.0]]])


def prefill(keys: Tensor) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys, value_states=keys, capacity=keys.shape[2] + 4, layer=0, num_layers=1
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(**settings: object) -> DoubleSparsity:
    method = DoubleSparsity(**settings)  # type: ignore[arg-type]
    method.load_artifact({"magnitude": MAGNITUDE})
    return method


def test_statistics_are_of_all_sequences() -> None:
    # One KV head, two query heads; a token's query meets its own key.
    keys = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])
    queries = torch.tensor([[[2.0, 1.0], [-1.0, 4.0]], [[0.0, 1.0], [1.0, 1.0]]])
    later = (torch.tensor([[[10.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1.0, 2.0]]]))
    found = DoubleSparsity().fit_layer(0, [(queries, keys), later])["magnitude"]
    # Sums of |q k|: (2 + 3 + 10, 2 + 0 + 0) and (0 + 3 + 0, 2 + 0 + 2), of three tokens.
    torch.testing.assert_close(found, torch.tensor([[5.0, 2 / 3], [1.0, 4 / 3]]))


def test_measured_tokens_are_spread_over_a_sequence() -> None:
    method = DoubleSparsity(calibration_queries=4)
    assert method.query_positions(0, [3, 4, 10]) == [[0, 1, 2], [0, 1, 2, 3], [0, 2, 5, 7]]
    queries, keys = random(2, 10, 4), random(1, 10, 4, seed=1)
    at = [0, 2, 5, 7]
    found = method.fit_layer(0, [(queries[:, at], keys)])["magnitude"]
    torch.testing.assert_close(found, (queries * keys)[:, at].abs().mean(1))


def test_channels_of_a_group_and_of_each_query() -> None:
    assert calibrated(channels=2).heavy_channels(MAGNITUDE[0], 1).tolist() == [[1, 3]]
    own = calibrated(channels=2, label_scope="query_head")
    assert own.heavy_channels(MAGNITUDE[0], 1).tolist() == [[1, 3], [0, 1]]
    equal = torch.ones(1, 8)
    assert calibrated().heavy_channels(equal, 1).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("scope", "wanted"),
    [
        ("kv_head", [[1 * 2 + 1 * 8, 0.0], [2 * 2 + 0 * 8, 0.0]]),
        ("query_head", [[1 * 2 + 1 * 8, 0.0], [5 * 1 + 2 * 2, 5 * 1 + 0.0]]),
    ],
)
def test_scores_by_hand(scope: str, wanted: list[list[float]], score: Score) -> None:
    keys = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 0.0, 9.0, 0.0]])[None, None]
    queries = torch.tensor([[7.0, 1.0, 7.0, 1.0], [5.0, 2.0, 7.0, 0.0]])[None, None]
    method = calibrated(channels=2, label_scope=scope)
    index = method.build_index(prefill(keys))
    assert score(method, index, queries, keys).tolist() == [[wanted]]
    if scope == "kv_head":
        assert index.labels[0, 0, :2].tolist() == [[2.0, 8.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("label_scope", "protocol", "heads"),
    [
        (None, "unified", 2),
        (None, "native", 6),
        ("kv_head", "native", 2),
        ("query_head", "unified", 6),
    ],
)
def test_labels_follow_the_protocol_unless_label_scope_is_set(
    label_scope: Any, protocol: Any, heads: int
) -> None:
    made = DoubleSparsity(channels=4, label_scope=label_scope, native={"head_scope": "query_head"})
    made.load_artifact({"magnitude": random(1, 6, 16).abs()}, "digest")
    method, _ = made.resolve(Policy(k=16, protocol=protocol))
    index = method.build_index(prefill(random(1, 2, 12, 16)))
    assert index.labels.shape == (1, heads, 16, 4)
    assert method.index_bytes_per_token(SHAPE) == heads * 4 * 4
    assert method.bytes_read(SHAPE, 60, 0) == 60 * heads * 4 * 4
    # One artifact serves both, and the original method is unchanged.
    assert method.artifact_spec(SHAPE) == made.artifact_spec(SHAPE)
    assert (method.artifact_digest, made.label_scope) == ("digest", label_scope)


def test_labels_inside_another_method_follow_its_policy() -> None:
    base = DoubleSparsity(channels=4)
    made = Twilight(base=base, native={"head_scope": "query_head"})
    made.load_artifact({"magnitude": random(1, 6, 16).abs()})
    unified = Policy(k=8, **FREE)  # type: ignore[arg-type]
    keys, queries = random(1, 2, 60, 16), random(1, 2, 3, 16, seed=1)
    for protocol, heads in (("unified", 2), ("native", 6)):
        method, policy = made.resolve(replace(unified, protocol=protocol))
        index = method.build_index(prefill(keys))
        assert index.base.labels.shape[1] == heads
        own = 2 * (16 / 2 + 4)
        assert method.index_bytes_per_token(SHAPE) == heads * 4 * 4 + own
        found = method.step(
            index, StepContext(queries, CacheView(keys, keys), policy, 0.25)
        ).selection
        assert found is not None
        assert found.indices.shape[1] == heads
    assert base.label_scope is None


@pytest.mark.parametrize("scope", ["kv_head", "query_head"])
def test_all_channels_are_exact_logits(scope: str, score: Score) -> None:
    queries, keys = random(2, 2, 3, 16), random(2, 2, 11, 16, seed=1)
    method = DoubleSparsity(channels=16, label_scope=scope)  # type: ignore[arg-type]
    method.load_artifact({"magnitude": random(1, 6, 16).abs()})
    index = method.build_index(prefill(keys))
    scores = score(method, index, queries, keys)
    torch.testing.assert_close(scores, queries @ keys.mT, atol=1e-5, rtol=1e-5)


def test_four_bit_labels_by_hand(score: Score) -> None:
    # Two heavy channels, -1 and 14: levels 0 and 15. Of equal ones, level 0 of a step of zero.
    keys = torch.tensor([[0.0, -1.0, 0.0, 14.0], [0.0, 5.0, 0.0, 5.0]])[None, None]
    method = calibrated(channels=2, label_bits=4)
    index = method.build_index(prefill(keys))
    assert index.ranges is not None
    assert index.labels[0, 0, :2].tolist() == [[0 + (15 << 4)], [0]]
    assert index.ranges[0, 0, :2].tolist() == [[-1.0, 1.0], [5.0, 0.0]]
    queries = torch.tensor([[0.0, 1.0, 0.0, 10.0], [0.0, 1.0, 0.0, 0.0]])[None, None]
    scores = score(method, index, queries, keys)
    assert scores.tolist() == [[[[139.0, 55.0], [-1.0, 5.0]]]]


def test_four_bit_labels_are_off_by_half_a_level(score: Score) -> None:
    keys = random(1, 2, 50, 16)
    method = DoubleSparsity(channels=8, label_bits=4)
    method.load_artifact({"magnitude": random(1, 2, 16).abs()})
    index = method.build_index(prefill(keys))
    heavy = keys.gather(3, index.channels[None, :, None].expand(1, -1, 50, -1))
    # One query along each channel reads the labels.
    queries = torch.eye(16)[index.channels][None]
    read = score(method, index, queries, keys).mT
    level = (heavy.amax(3) - heavy.amin(3))[..., None] / 15
    assert ((read - heavy).abs() <= 0.5 * level + 5e-3).all()
    assert not torch.allclose(read, heavy, atol=1e-2)
    appended = random(1, 2, 1, 16, seed=5)
    method.append(index, appended, appended)
    longer = method.build_index(prefill(torch.cat([keys, appended], 2)))
    assert torch.equal(index.labels[:, :, :51], longer.labels[:, :, :51])


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("scope", ["kv_head", "query_head"])
def test_bytes_equal_the_reads_counted(
    scope: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels of every token and the selected tokens, counted in bytes."""
    queries, keys = random(1, 2, 3, 16), random(1, 2, 60, 16, seed=1)
    seen: list[Tensor] = []
    plain: Callable[..., Tensor] = double_sparsity.lowrank_score

    def watched(query: Tensor, rows: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(rows)
        return plain(query, rows, *args, **kwargs)

    monkeypatch.setattr(double_sparsity, "lowrank_score", watched)
    settings = {"label_scope": scope, "label_bits": bits, "impl": "reference"}
    method = DoubleSparsity(**settings)  # type: ignore[arg-type]
    method.load_artifact({"magnitude": random(1, 6, 16).abs()})
    index = method.build_index(prefill(keys))
    view = CacheView(keys, keys)
    policy = Policy(k=16, head_scope=scope)  # type: ignore[arg-type]
    step = method.step(index, StepContext(queries, view, policy, 16**-0.5))
    assert step.selection is not None
    tokens = step.selection.tokens_read(view)
    # 4-bit labels reach the kernel unpacked; stored they are half a byte each, and 4 bytes a token.
    packed = seen[0].numel() // 2 + seen[0][..., 0].numel() * 4
    labels = packed if bits == 4 else seen[0].nbytes
    assert len(seen) == 1
    read = labels + int(tokens.sum()) * 2 * 16 * 4
    if scope == "kv_head":
        assert method.bytes_read(SHAPE, 60, 16) == read
    assert method.bytes_read(SHAPE, 60, 0) == labels


def test_bad_settings_and_artifacts_are_refused() -> None:
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        DoubleSparsity(channels=0)
    with pytest.raises(ValueError, match="label_bits must be 4 or 16, got 8"):
        DoubleSparsity(label_bits=8)
    with pytest.raises(ValueError, match=r"kv_head, query_head, or null to follow .* got 'layer'"):
        DoubleSparsity(label_scope="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channels must be at most head_dim=16, got 17"):
        check_ready(DoubleSparsity(channels=17), SHAPE)
    with pytest.raises(ValueError, match="channels must be even for labels of 4 bits, got 3"):
        check_ready(DoubleSparsity(channels=3, label_bits=4), SHAPE)
    with pytest.raises(ValueError, match="got no artifact"):
        DoubleSparsity().build_index(prefill(torch.zeros(1, 1, 3, 4)))
    with pytest.raises(ValueError, match=r"and d=6, got \[1, 2, 4\]; fit it"):
        calibrated().build_index(prefill(torch.zeros(1, 1, 3, 6)))
