"""The ranking recipe: its draws, its loss by hand, its gradient, and the recall it reaches."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import Geometry, PrefillInputs
from topkbench.methods.hash_ranking import RankingBatch, RankingRecipe, signs
from topkbench.methods.hash_training import rate
from topkbench.methods.hata import HATA

Score = Callable[..., Tensor]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"recipe": "ranking", "use_norm": False, "ranking_queries": 8}


def recipe(**settings: Any) -> RankingRecipe:
    defaults: dict[str, Any] = {
        "widths": [32],
        "query_codes": 1,
        "use_norm": False,
        "centre_keys": False,
        "steps": 20,
        "learning_rate": 0.15,
        "pool": 300,
        "queries": 8,
        "keys": 128,
        "late_share": 0.5,
    }
    return RankingRecipe(**defaults | settings)


class Skewed:
    """Two query heads per KV head; 4 of 16 channels decide dot products, the others are noise."""

    num_layers = 2
    sequences = 4

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [self.draw(200 + 50 * i, seed=10 * layer + i) for i in range(self.sequences)]

    @staticmethod
    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(2, n, 16, generator=generator)
        keys = torch.randn(1, n, 16, generator=generator)
        queries[..., 4:] *= 0.05
        keys[..., 4:] *= 3.0
        return 4 * queries, keys


def recall(method: HATA, score: Score, shift: float = 0.0) -> float:
    """Return the recall of the true top 32 of 512 keys, averaged over 40 queries."""
    queries, keys = Skewed.draw(512, seed=99)
    keys = keys[None] + shift
    index = method.build_index(
        PrefillInputs(key_states=keys, value_states=keys, capacity=512, layer=0, num_layers=2)
    )
    found = 0.0
    for group in queries[None, None, :, :40].unbind(3):
        kept = score(method, index, group, keys)[0, 0].topk(32).indices
        weights = (group @ keys.mT * 16**-0.5).softmax(-1).sum(2)
        exact = weights[0, 0].topk(32).indices
        found += len(set(kept.tolist()) & set(exact.tolist())) / 32 / 40
    return found


def fitted(**settings: Any) -> HATA:
    method = HATA(**SMALL | settings)
    method.load_artifact(method.fit(Skewed()))
    return method


def test_ranking_beats_the_published_recipe_and_untrained_weights(score: Score) -> None:
    ranking = recall(fitted(rbit=32, ranking_steps=200), score)
    assert ranking > recall(fitted(rbit=32, recipe="published"), score) + 0.1
    drawn = HATA(rbit=32, weights="orthonormal", use_norm=False)
    assert ranking > recall(drawn, score) + 0.1


def test_training_repeats_itself_by_its_seed() -> None:
    first, second, other = (HATA(**SMALL, ranking_steps=3, seed=s).fit(Skewed()) for s in (0, 0, 1))
    assert first.keys() == {"hash_weight", "query_weight"}
    for name in first:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])


def test_shapes() -> None:
    tensors = HATA(**SMALL, rbit=64, query_codes=3, ranking_steps=2).fit(Skewed())
    assert tensors["hash_weight"].shape == (2, 1, 16, 64)
    assert tensors["query_weight"].shape == (2, 1, 16, 192)


def kept(made: RankingRecipe, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each sequence's query positions, the queries there, and its keys."""
    states = Skewed().states(0)
    lengths = [keys.shape[1] for _, keys in states]
    positions = made.positions(lengths, torch.Generator().manual_seed(seed))
    return [
        (torch.tensor(at), queries[:, at], keys)
        for at, (queries, keys) in zip(positions, states, strict=True)
    ]


def test_queries_kept_are_from_the_second_half_and_the_end() -> None:
    made = recipe(pool=300)
    short, longer = made.positions([10, 200], torch.Generator().manual_seed(0))
    assert set(short[:300]) == set(range(5, 10))
    assert short[300:] == list(range(5, 10))
    assert min(longer[:300]) >= 100
    assert max(longer[:300]) < 200
    assert len(set(longer[:300])) > 80
    assert longer[300:] == list(range(152, 200))


def test_a_batch_is_from_one_sequence_and_its_top_keys_are_those_of_attention() -> None:
    made = recipe(keys=10_000)
    lengths, late, shares = set(), 0, set()
    for seed in range(30):
        sequences = kept(made, seed)
        batch = made.draw(sequences, torch.Generator().manual_seed(seed))
        length = batch.keys.shape[1]
        ((at, queries, keys),) = [one for one in sequences if one[2].shape[1] == length]
        slots = (batch.keys[0, :, None] == keys[0]).all(-1).int().argmax(1)
        assert sorted(slots.tolist()) == list(range(length))
        positions = at[(batch.queries[0, 0, :, None] == queries[0]).all(-1).int().argmax(1)]
        assert (positions[4:] >= length - 48).all()
        assert torch.equal(batch.visible, slots <= positions[:, None])
        logits = batch.queries @ batch.keys.mT / 4
        weights = logits.masked_fill(~batch.visible, -torch.inf).softmax(-1).sum(1)
        count = batch.top.shape[2]
        assert torch.equal(batch.top, weights.topk(count).indices)
        assert 1 <= count <= length / 8
        assert batch.visible[None].gather(2, batch.top).all()
        lengths.add(length)
        late += int((positions[:4] < length - 48).sum())
        shares.add(count)
    assert lengths == {200, 250, 300, 350}
    assert late > 30  # of 120 queries from the second half; by chance others are among the last 48
    assert len(shares) > 10


@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize("query_codes", [1, 2])
def test_loss_by_hand(query_codes: int, use_norm: bool) -> None:
    """Loops over queries, group members, codes and keys, with scores as in decoding."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, 3, 5, 4, generator=generator)
    keys = torch.randn(2, 7, 4, generator=generator)
    visible = torch.ones(5, 7, dtype=torch.bool)
    visible[0, 3:] = False
    top = torch.randint(0, 3, (2, 5, 2), generator=generator)
    weight = torch.randn(2, 4, 32, generator=generator)
    query_weight = torch.randn(2, 4, 32 * query_codes, generator=generator)
    made = recipe(query_codes=query_codes, use_norm=use_norm)
    log_factor = torch.tensor([0.3, -1.0])[:, None, None]
    batch = RankingBatch(queries, keys, visible, top)
    found = made.loss(weight, query_weight, [log_factor], batch)

    wanted = 0.0
    for head in range(2):
        lengths = [keys[head, k].norm().item() for k in range(7)]
        for q in range(5):
            scores = []
            for k in range(7):
                score = 0.0
                for member in range(3):
                    for code in range(query_codes):
                        own = query_weight[head, :, 32 * code : 32 * code + 32]
                        agree = (queries[head, member, q] @ own > 0) == (
                            keys[head, k] @ weight[head] > 0
                        )
                        score += (2 * agree.sum().item() - 32) / (3 * query_codes)
                if use_norm:
                    score *= lengths[k] / (sum(lengths) / 7)
                scores.append(score * math.exp(log_factor[head].item()))
            seen = [scores[k] for k in range(7) if visible[q, k]]
            total = math.log(sum(math.exp(score) for score in seen))
            wanted += sum(total - scores[k] for k in top[head, q].tolist()) / 2
    assert found.item() == pytest.approx(wanted / 10, rel=1e-5)


@pytest.mark.parametrize("use_norm", [False, True])
def test_the_loss_of_several_widths_is_the_mean_of_those_of_the_prefixes(use_norm: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    batch = RankingBatch(
        queries=torch.randn(2, 3, 5, 4, generator=generator),
        keys=torch.randn(2, 7, 4, generator=generator),
        visible=torch.ones(5, 7, dtype=torch.bool),
        top=torch.randint(0, 7, (2, 5, 2), generator=generator),
    )
    weight = torch.randn(2, 4, 128, generator=generator)
    query_weight = torch.randn(2, 4, 2, 128, generator=generator)
    factors = [torch.tensor([-0.3 * place, -1.0])[:, None, None] for place in (1, 2, 3)]
    made = recipe(widths=[32, 64, 128], query_codes=2, use_norm=use_norm)
    found = made.loss(weight, query_weight.flatten(2), factors, batch)
    alone = [
        recipe(widths=[width], query_codes=2, use_norm=use_norm).loss(
            weight[..., :width], query_weight[..., :width].flatten(2), [factor], batch
        )
        for width, factor in zip((32, 64, 128), factors, strict=True)
    ]
    assert found.item() == pytest.approx(sum(one.item() for one in alone) / 3, rel=1e-5)


def test_one_fit_serves_several_widths(score: Score) -> None:
    settings = {"fit_rbit": 128, "ranking_steps": 200, "query_codes": 2}
    geometry = Geometry(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    wide = fitted(rbit=128, **settings)
    assert wide.artifact["query_weight"].shape == (2, 1, 16, 256)
    spec = wide.artifact_spec(geometry)
    assert spec is not None
    assert spec["fit_rbit"] == 128
    assert "rbit" not in spec
    keys = Skewed.draw(40, seed=1)[1][None]
    prompt = PrefillInputs(key_states=keys, value_states=keys, capacity=40, layer=0, num_layers=2)
    codes = wide.build_index(prompt).key_codes
    assert codes.shape == (1, 1, 40, 4)
    found = {}
    for rbit in (32, 64):
        narrow = HATA(**SMALL, rbit=rbit, **settings)  # type: ignore[arg-type]
        assert narrow.artifact_spec(geometry) == spec
        assert narrow.artifact_layout(geometry) == wide.artifact_layout(geometry)
        narrow.load_artifact(wide.artifact)
        assert torch.equal(narrow.build_index(prompt).key_codes, codes[..., : rbit // 32])
        queries = wide.query_weight(0, 2, 1, 16, CPU).unflatten(2, (2, 128))
        own = narrow.query_weight(0, 2, 1, 16, CPU).unflatten(2, (2, rbit))
        assert torch.equal(own, queries[..., :rbit])
        found[rbit] = recall(narrow, score)
        assert found[rbit] > recall(fitted(rbit=rbit, ranking_steps=200), score) - 0.1
    assert found[32] < found[64] < recall(wide, score)


@pytest.mark.parametrize(("bits", "widths"), [(32, [32]), (96, [96]), (256, [32, 64, 128, 256])])
def test_the_fitted_widths_are_halves_down_to_32_bits(bits: int, widths: list[int]) -> None:
    for rbit, fit_rbit in ((widths[0], bits), (bits, 32)):  # at least so many are fitted
        method = HATA(rbit=rbit, fit_rbit=fit_rbit, recipe="ranking")
        assert method._widths == widths


def test_a_sign_has_the_gradient_of_tanh() -> None:
    at = torch.tensor([-2.0, -0.0, 0.0, 0.5], requires_grad=True)
    found = signs(at)
    assert found.tolist() == pytest.approx([-1.0, -1.0, -1.0, 1.0])
    found.backward(torch.tensor([1.0, 1.0, 1.0, 2.0]))
    slopes = [1 - math.tanh(2.0) ** 2, 1.0, 1.0, 2 * (1 - math.tanh(0.5) ** 2)]
    assert at.grad is not None
    assert at.grad.tolist() == pytest.approx(slopes)


def test_a_step_against_the_gradient_lowers_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    made = recipe(queries=64)
    batch = made.draw(kept(made, 0), generator)
    weight = 0.25 * torch.randn(1, 16, 32, generator=generator).requires_grad_()
    query_weight, factor = weight.detach().clone(), torch.full((1, 1, 1), -1.0)
    before = made.loss(weight, query_weight, [factor], batch)
    (slope,) = torch.autograd.grad(before, weight)
    after = made.loss(weight - 0.1 * slope / slope.abs().max(), query_weight, [factor], batch)
    assert after < before


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == pytest.approx(rates[19])
    assert rates[19:] == sorted(rates[19:], reverse=True)
    assert rates[100] == pytest.approx(0.02)


def test_codes_of_a_query_are_summed_by_hand(score: Score) -> None:
    """A key's code and a query's first code use the first channel, its second code the second."""
    weight, query_weight = torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 2, 64)
    weight[..., 0, :] = 1.0
    query_weight[..., 0, :32] = 1.0
    query_weight[..., 1, 32:48] = 1.0
    query_weight[..., 1, 48:] = -1.0
    method = HATA(rbit=32, recipe="ranking", query_codes=2, use_norm=False)
    method.load_artifact({"hash_weight": weight, "query_weight": query_weight})
    keys = torch.tensor([[3.0, 1.0], [-1.0, 1.0]])[None, None]
    index = method.build_index(
        PrefillInputs(key_states=keys, value_states=keys, capacity=2, layer=0, num_layers=1)
    )
    # Of the query (+, +): 32 bits agree with the first key by the first code, 16 of 32 by the
    # second. The query (-, 0) has no bit set.
    found = score(method, index, torch.tensor([[1.0, 2.0]])[None, None], keys)
    assert found.tolist() == [[[32 + 0, -32 + 0]]]
    found = score(method, index, torch.tensor([[-1.0, 0.0]])[None, None], keys)
    assert found.tolist() == [[[-32 - 32, 32 + 32]]]


def test_centred_keys_are_hashed_after_subtracting_the_rows_mean() -> None:
    method = HATA(rbit=32, weights="random", centre_keys=True)
    plain = HATA(rbit=32, weights="random")
    assert (method.traits.index, plain.traits.index) == ("prompt", "token")
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(2, 1, 9, 8, generator=generator) + 3.0
    keys[1, :, :4] = torch.nan  # padding may hold anything
    start, end = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([7, 9], dtype=torch.int32)

    def index(method: HATA, states: Tensor, **bounds: Tensor) -> Any:
        return method.build_index(
            PrefillInputs(
                key_states=states,
                value_states=states,
                capacity=12,
                layer=0,
                num_layers=1,
                **bounds,
            )
        )

    found = index(method, keys, kv_start=start, kv_len=end)
    for row, rows in enumerate((slice(0, 7), slice(4, 9))):
        mean = keys[row, :, rows].mean(1, keepdim=True)
        wanted = index(plain, keys[row : row + 1, :, rows] - mean)
        count = rows.stop - rows.start
        assert torch.equal(found.key_codes[row, :, rows], wanted.key_codes[0, :, :count])
        torch.testing.assert_close(found.key_norms[row, :, rows], wanted.key_norms[0, :, :count])

    # The same mean is subtracted from a decoded key.
    one = index(method, keys[:1, :, :7])
    new = torch.randn(1, 1, 1, 8, generator=generator) + 3.0
    method.append(one, new, new)
    mean = keys[:1, :, :7].mean(2, keepdim=True)
    assert torch.equal(one.key_codes[0, 0, 7], index(plain, new - mean).key_codes[0, 0, 0])
    torch.testing.assert_close(one.key_norms[0, 0, 7], (new - mean).norm())


def test_centring_undoes_a_shift_of_all_keys(score: Score) -> None:
    shift = 20.0
    off = HATA(rbit=64, weights="orthonormal", use_norm=False)
    on = HATA(rbit=64, weights="orthonormal", use_norm=False, centre_keys=True)
    assert recall(off, score, shift) < recall(off, score) - 0.1
    assert recall(on, score, shift) == pytest.approx(recall(on, score), abs=0.02)


def test_each_recipe_has_its_own_artifacts() -> None:
    geometry = Geometry(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    published = HATA().artifact_spec(geometry)
    assert published is not None
    assert not [name for name in published if name == "recipe" or name.startswith("ranking")]
    assert published == HATA(ranking_steps=7, centre_keys=True).artifact_spec(geometry)
    ranking = HATA(recipe="ranking").artifact_spec(geometry)
    assert ranking is not None
    assert ranking["recipe"] == "ranking"
    for changed in ({"use_norm": False}, {"query_codes": 2}, {"ranking_steps": 7}, {"rbit": 64}):
        other = HATA(**{"recipe": "ranking"} | changed).artifact_spec(geometry)  # type: ignore[arg-type]
        assert other != ranking
    # Settings of the published recipe do not change the artifact of the ranking recipe.
    assert ranking == HATA(recipe="ranking", sigma=0.5, epochs=3).artifact_spec(geometry)


def test_bytes_of_two_projections_by_hand() -> None:
    geometry = Geometry(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
    method = HATA(recipe="ranking", rbit=64, use_norm=False, query_codes=2)
    assert method.index_bytes_per_token(geometry) == 8 * 8
    # Codes of 1,024 tokens, a key's projection and two of a query, 512 keys and values.
    wanted = 1024 * 64 + 8 * 128 * (64 + 128) * 4 + 512 * 8 * 128 * 2 * 2
    assert method.bytes_read(geometry, 1024, 512) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "listwise"}, "recipe must be one of published, ranking, got 'listwise'"),
        ({"query_codes": 2}, "query_codes must be 1 unless codes are trained by ranking, got 2"),
        (
            {"query_codes": 2, "recipe": "ranking", "weights": "random"},
            "query_codes must be 1 unless codes are trained by ranking, got 2",
        ),
        ({"ranking_keys": 64}, "ranking_keys must be at least 128, got 64"),
        ({"ranking_late_share": 1.5}, "ranking_late_share must be a share from 0 to 1, got 1.5"),
        ({"ranking_steps": 0}, "ranking_steps must be at least 1, got 0"),
        ({"fit_rbit": 256}, "fit_rbit must be null unless codes are trained by ranking, got 256"),
        (
            {"recipe": "ranking", "rbit": 96, "fit_rbit": 128},
            "rbit must be one of the widths that fit_rbit=128 trains, 32, 64, 128, got 96",
        ),
        ({"recipe": "ranking", "fit_rbit": 250}, "fit_rbit must be a positive multiple of 32"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HATA(**settings)


def test_an_artifact_without_the_queries_projection_is_refused() -> None:
    method = HATA(rbit=32, recipe="ranking", query_codes=2)
    with pytest.raises(
        ValueError, match=r"must hold query_weight \[L, Hkv, d, 2 \* rbit\] .* none"
    ):
        method.load_artifact({"hash_weight": torch.zeros(1, 1, 4, 32)})
    with pytest.raises(ValueError, match=r"query_weight .* rbit=32, got \[1, 1, 4, 32\]"):
        method.load_artifact(
            {"hash_weight": torch.zeros(1, 1, 4, 32), "query_weight": torch.zeros(1, 1, 4, 32)}
        )


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("length", [2, 3, 90])
def test_short_sequences_and_other_heads_train(head_dim: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        (
            torch.randn(6, 300 + min(48, length - length // 2), head_dim, generator=generator),
            torch.randn(2, length, head_dim, generator=generator),
        )
    ]
    losses: list[tuple[int, int, float]] = []
    made = recipe(widths=[96], steps=3, query_codes=2)
    fitted = made.fit_layer(states, generator, lambda *progress: losses.append(progress))
    assert [progress[:2] for progress in losses] == [(1, 3), (2, 3), (3, 3)]
    shapes = {name: weight.shape for name, weight in fitted.items()}
    assert shapes == {"hash_weight": (2, head_dim, 96), "query_weight": (2, head_dim, 192)}
    assert all(weight.isfinite().all() for weight in fitted.values())


def test_its_weights_are_kept_in_sixteen_bits_and_computed_with_in_thirty_two() -> None:
    method = HATA(rbit=32, recipe="ranking", ranking_steps=2)
    fitted = method.fit(Skewed())
    assert {name: weight.dtype for name, weight in fitted.items()} == {
        "hash_weight": torch.float16,
        "query_weight": torch.float16,
    }
    method.load_artifact(fitted)
    weight = method.query_weight(1, 2, 1, 16, CPU)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, fitted["query_weight"][1].float())
    assert HATA(rbit=32, epochs=1, steps_per_epoch=1).fit(Skewed())["hash_weight"].dtype == (
        torch.float32
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_appending_equals_rebuilding_with_several_codes(impl: Any, score: Score) -> None:
    method = HATA(rbit=32, recipe="ranking", query_codes=3, ranking_steps=2, impl=impl)
    method.load_artifact(method.fit(Skewed()))
    queries, keys = Skewed.draw(40, seed=1)
    keys = keys[None].bfloat16()
    group = queries[None, :, 0][:, None].bfloat16()

    def index(n: int) -> Any:
        part = keys[:, :, :n]
        return method.build_index(
            PrefillInputs(key_states=part, value_states=part, capacity=40, layer=1, num_layers=2)
        )

    found, wanted = index(38), index(40)
    for slot in (38, 39):
        method.append(found, keys[:, :, slot, None], keys[:, :, slot, None])
    assert torch.equal(found.key_codes, wanted.key_codes)
    scores = score(method, found, group, keys)
    assert scores.shape == (1, 1, 40)
    torch.testing.assert_close(scores, score(method, wanted, group, keys))
    # The same sum over two queries of three codes each, one code at a time.
    weight = method.query_weight(1, 2, 1, 16, CPU)
    one_by_one = torch.zeros(40)
    for code in range(3):
        own = group.float() @ weight[:, :, 32 * code : 32 * code + 32] > 0
        held = keys.float() @ method.hash_weight(1, 2, 1, 16, CPU) > 0
        agree = (own[:, :, :, None] == held[:, :, None]).sum(-1)[0, 0]
        one_by_one += ((2 * agree - 32) / 32).sum(0) * keys[0, 0].float().norm(dim=-1)
    torch.testing.assert_close(scores[0, 0], one_by_one, rtol=1e-4, atol=1e-4)
