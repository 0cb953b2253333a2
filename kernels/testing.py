"""Checks that tests and benchmarks share: what makes two results of an operator the same."""

import torch
from torch import Tensor


def assert_same_selection(
    indices: Tensor, expected: Tensor, scores: Tensor, tolerance: float = 0.0
) -> None:
    """Check that two selections are equally good: the same scores, whichever units hold them.

    Args:
        indices: ``[B, H, m]`` selected units, -1 for none, in any order.
        expected: ``[B, H, m]`` likewise.
        scores: ``[B, H, U]`` that both were selected by.
        tolerance: How far sorted scores may differ; above 0 only where the scores themselves were
            rounded differently.

    Raises:
        AssertionError: If an index is out of range or repeated, a row's number of units differs,
            or a score does.
    """
    num_units = scores.shape[-1]
    chosen = []
    for name, selected in (("indices", indices), ("expected", expected)):
        assert bool((selected >= -1).all() and (selected < num_units).all()), (
            f"{name} must lie in -1 to {num_units - 1}, got {selected.min()} to {selected.max()}."
        )
        ordered = selected.sort(-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        assert not bool(repeated.any()), f"{name} must be distinct, got a unit twice."
        held = scores.double().gather(-1, selected.clamp(min=0).long())
        chosen.append(held.masked_fill(selected < 0, -torch.inf).sort(-1).values)
    counts = [(selected >= 0).sum(-1) for selected in (indices, expected)]
    assert torch.equal(*counts), f"rows must hold {counts[1]} units, got {counts[0]}."
    both = torch.isfinite(chosen[0]) & torch.isfinite(chosen[1])
    difference = torch.where(both, (chosen[0] - chosen[1]).abs(), 0.0)
    same = (difference <= tolerance) & (both | (chosen[0] == chosen[1]))
    assert bool(same.all()), (
        f"selected scores must agree within {tolerance}, differ by {difference.max()}."
    )


def assert_as_accurate(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Check that a result errs no more than the reference of its precision does, plus rounding.

    Args:
        actual: What is checked.
        reference: The specification's result from the same inputs in the same precision.
        exact: The specification's result in float64. Where it is infinite, so must be ``actual``.

    Raises:
        AssertionError: If an infinite element differs, or the largest error exceeds twice the
            reference's (the same operations in another order) plus the result's own rounding.
    """
    finite = torch.isfinite(exact)
    assert torch.equal(actual.double()[~finite], exact.double()[~finite]), (
        "infinite elements must stand where the exact result has them."
    )
    if not bool(finite.any()):
        return
    truth = exact.double()[finite]
    error = (actual.double()[finite] - truth).abs().max().item()
    own = (reference.double()[finite] - truth).abs().max().item()
    # Where terms cancel, the sums that are rounded are larger than what is left of them.
    rounding = 8 * torch.finfo(actual.dtype).eps * max(1.0, truth.abs().max().item())
    allowed = 2 * own + rounding
    assert error <= allowed, f"the error must be at most {allowed:.3g}, got {error:.3g}."


def assert_same_bits(codes: Tensor, states: Tensor, hash_weight: Tensor) -> None:
    """Check hash codes against float64, except bits whose projection is zero up to rounding.

    Args:
        codes: ``[B, Hkv, n, rbit // 32]`` int32.
        states: ``[B, Hkv, n, d]``.
        hash_weight: ``[Hkv, d, rbit]``.

    Raises:
        AssertionError: If a bit differs whose projection is further from zero than ``d`` roundings
            of its terms could move it.
    """
    exact_states, exact_weight = states.double(), hash_weight.double()
    projected = exact_states @ exact_weight
    terms = exact_states.abs() @ exact_weight.abs()
    noise = states.shape[-1] * torch.finfo(torch.float32).eps * terms
    shifts = torch.arange(32, device=codes.device)
    bits = (codes.long()[..., None] >> shifts & 1).flatten(-2).bool()
    wrong = (bits != (projected > 0)) & (projected.abs() > noise)
    assert not bool(wrong.any()), f"{int(wrong.sum())} bits must differ only at rounding level."
