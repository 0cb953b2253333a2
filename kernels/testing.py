"""Checks shared by tests and benchmarks of whether two results of an operator agree."""

import torch
from torch import Tensor

from topkbench.kernels.sparse_attention.api import sparse_attention


class WrongResult(AssertionError):
    """A result that disagrees with the reference; other AssertionErrors do not concern results."""


def require(right: bool, message: str) -> None:
    """Raise WrongResult with the message unless a result is right."""
    if not right:
        raise WrongResult(message)


def assert_same_selection(
    indices: Tensor, expected: Tensor, scores: Tensor, tolerance: float = 0.0
) -> None:
    """Check that two selections are equally good: their units have the same scores.

    Args:
        indices: ``[B, H, m]`` selected units, -1 for none, in any order.
        expected: ``[B, H, m]`` likewise.
        scores: ``[B, H, U]`` that both were selected by.
        tolerance: Largest difference between sorted scores; above 0 only if the scores themselves
            were rounded differently.

    Raises:
        WrongResult: If an index is out of range or repeated, a row's number of units differs,
            or a score does.
    """
    num_units = scores.shape[-1]
    chosen = []
    for name, selected in (("indices", indices), ("expected", expected)):
        require(
            bool((selected >= -1).all() and (selected < num_units).all()),
            f"{name} must lie in -1 to {num_units - 1}, got {selected.min()} to {selected.max()}.",
        )
        ordered = selected.sort(-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        require(not bool(repeated.any()), f"{name} must be distinct, got a unit twice.")
        selected_scores = scores.double().gather(-1, selected.clamp(min=0).long())
        chosen.append(selected_scores.masked_fill(selected < 0, -torch.inf).sort(-1).values)
    counts = [(selected >= 0).sum(-1) for selected in (indices, expected)]
    require(torch.equal(*counts), f"rows must hold {counts[1]} units, got {counts[0]}.")
    both = torch.isfinite(chosen[0]) & torch.isfinite(chosen[1])
    difference = torch.where(both, (chosen[0] - chosen[1]).abs(), 0.0)
    same = (difference <= tolerance) & (both | (chosen[0] == chosen[1]))
    require(
        bool(same.all()),
        f"selected scores must agree within {tolerance}, differ by {difference.max()}.",
    )


def gamma(num_roundings: int) -> float:
    """Return a bound on the relative error of ``num_roundings`` successive float32 operations.

    A sum of ``n`` terms, added in any order, has an error of at most ``gamma(n)`` times the sum of
    the terms' absolute values, however much of it cancels.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, lemma 3.1 and section
        3.1. The unit roundoff there is half of ours, since an operation here may truncate instead
        of rounding to nearest, as matrix units do.
    """
    relative = num_roundings * torch.finfo(torch.float32).eps
    return relative / (1 - relative)


def assert_within_bound(result: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Check that a result's error is within a bound on its computation, plus its final rounding.

    ``|result - exact| <= bound + u * |exact|`` must hold for every element; ``u`` is half the
    distance from 1 to the next number in the result's dtype. A bound is ``gamma(n)`` times the sum
    of the terms' absolute values, which is the specification's result for absolute inputs. It is
    not proportional to the result, in which terms may have cancelled.

    Args:
        result: The result to check, of any shape.
        exact: The specification's result in float64. Where it is infinite, so must be ``result``.
        bound: Bound on the error before the result is rounded to its dtype; ignored where ``exact``
            is infinite.

    Raises:
        WrongResult: If an infinite element differs, or an element's error exceeds its bound.
    """
    finite = torch.isfinite(exact)
    require(
        torch.equal(result.double()[~finite], exact.double()[~finite]),
        "the result must be infinite exactly where the exact one is.",
    )
    limits = torch.finfo(result.dtype)
    smallest = limits.smallest_normal * limits.eps
    allowed = bound + limits.eps / 2 * exact.double().abs() + smallest / 2
    error = (result.double() - exact).abs()
    # Negated, so that NaN counts as wrong.
    wrong = finite & ~(error <= allowed)
    if bool(wrong.any()):
        worst = torch.where(wrong, error / allowed, 0.0).nan_to_num(torch.inf).argmax()
        raise WrongResult(
            f"the error must be at most {allowed.flatten()[worst]:.3g}, got "
            f"{error.flatten()[worst]:.3g} in element {int(worst)} of {list(result.shape)}; "
            f"{int(wrong.sum())} elements are wrong."
        )


def assert_attended(
    out: Tensor,
    lse: Tensor | None,
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    indices: Tensor,
    scale: float,
    count: Tensor | None = None,
    log_weight: Tensor | None = None,
    unit_size: int = 1,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Check a decode step's output, and its log-sum-exp if given, against float64.

    A logit is a sum of ``d`` products; let ``A`` be the largest sum of their absolute values, plus
    that of the log weight. The logit's error is at most ``gamma(d) * A``. The exponential of its
    distance to the maximum, which is at most ``2 * A``, has a relative error of as much again, and
    the sums over ``t`` tokens one of ``gamma(t)``. With ``n = d + t + 16``, where 16 counts the
    single operations on the way (scale, cap, exponential, logarithm, merging), the log-sum-exp's
    error is at most ``gamma(n) * (1 + A)``, and the output's is twice that times
    ``sum_t w_t |v_t|``, since its weights and their denominator have the same bound. The weights
    may be rounded to the states' dtype before they multiply the values, as matrix units need them,
    which adds ``u`` times that sum. (Weights that are subnormal in float16 are rounded more
    coarsely; they are too small to matter unless thousands make up the sum.) A sink is a token
    without a value, whose logit is exact; ``A`` is at least its absolute value.

    Args:
        out: ``[B, Hq, dv]`` the output to check.
        lse: ``[B, Hq]`` the log-sum-exp to check, or None.
        query_states: This and all that follow: the operator's arguments.
        key_states: See the api.
        value_states: See the api.
        indices: See the api.
        scale: See the api.
        count: See the api.
        log_weight: See the api.
        unit_size: See the api.
        kv_start: See the api.
        kv_len: See the api.
        softcap: See the api.
        sinks: See the api.

    Raises:
        WrongResult: If an element's error exceeds its bound.
    """
    head_dim, num_tokens = query_states.shape[-1], indices.shape[-1] * unit_size
    query, keys, values = (states.double() for states in (query_states, key_states, value_states))
    where = (unit_size, kv_start, kv_len)
    arguments = (indices, scale, count, log_weight, *where, softcap, sinks)
    exact, exact_lse = sparse_attention(query, keys, values, *arguments, impl="reference")
    magnitude, _ = sparse_attention(query, keys, values.abs(), *arguments, impl="reference")
    if log_weight is not None:  # -inf excludes its unit
        log_weight = torch.where(log_weight == -torch.inf, log_weight, log_weight.abs())
    absolute = None if sinks is None else sinks.abs()
    sizes = (indices, abs(scale), count, log_weight, *where, None, absolute)
    # The log-sum-exp of the absolute logits is no smaller than the largest of them.
    _, largest = sparse_attention(query.abs(), keys.abs(), values, *sizes, impl="reference")
    relative = gamma(head_dim + num_tokens + 16) * (1 + largest.clamp(min=0.0))
    rounding = torch.finfo(query_states.dtype).eps / 2
    assert_within_bound(out, exact, (2 * relative[..., None] + rounding) * magnitude)
    if lse is not None:
        assert_within_bound(lse, exact_lse, relative)


def full_attention_bound(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return full attention in float64 and the bound on a kernel's error, for every element.

    The bound is that of `assert_attended`. KV heads are processed one after the other, so that a
    cache of several GiB needs little additional memory.

    Args:
        query_states: ``[B, Hq, d]``.
        key_states: ``[B, Hkv, n, d]``.
        value_states: ``[B, Hkv, n, dv]``.
        scale: Factor on the dot products.
        kv_start: ``[B]`` int32, or None for 0.
        kv_len: ``[B]`` int32, or None for ``n``.
        sinks: ``[Hq]`` logits of learned sinks, or None.

    Returns:
        Both ``[B, Hq, dv]`` float64; zeros where a row has no valid slot.
    """
    batch_size, num_kv_heads, num_slots, head_dim = key_states.shape
    grouped = query_states.unflatten(1, (num_kv_heads, -1)).double()
    exact = grouped.new_zeros(*grouped.shape[:3], value_states.shape[3])
    bound = torch.zeros_like(exact)
    # Without a sink, one of minus infinity: a token that has no weight.
    column = grouped.new_full(grouped.shape[1:3], -torch.inf)
    if sinks is not None:
        column = sinks.double().view_as(column)
    rounding = torch.finfo(query_states.dtype).eps / 2
    starts = [0] * batch_size if kv_start is None else kv_start.tolist()
    ends = [num_slots] * batch_size if kv_len is None else kv_len.tolist()
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start >= end:
            continue
        for head in range(num_kv_heads):
            query, keys, values = (
                grouped[row, head],
                key_states[row, head, start:end].double(),
                value_states[row, head, start:end].double(),
            )
            logits = torch.cat([query @ keys.T * scale, column[head, :, None]], -1)
            weights = logits.softmax(-1)[:, :-1]
            largest = (query.abs() @ keys.abs().T).amax(-1, keepdim=True) * abs(scale)
            if sinks is not None:
                largest = largest.maximum(column[head, :, None].abs())
            relative = gamma(head_dim + end - start + 16) * (1 + largest)
            exact[row, head] = weights @ values
            bound[row, head] = (2 * relative + rounding) * (weights @ values.abs())
    return exact.flatten(1, 2), bound.flatten(1, 2)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Check that the norm of a result's error is as small as its dtype allows.

    The bounds on single elements cover the worst case of rounding, which grows with the number of
    tokens and never occurs in all elements at once. A token that a kernel skips or counts twice
    could cause an error within them.

    Raises:
        WrongResult: If the error's norm is more than `near_tolerance` times the result's.
    """
    tolerance = near_tolerance(found.dtype)
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    require(
        error <= tolerance,  # false for NaN
        f"the error's norm must be at most {tolerance} of the result's, got {error:.3g}.",
    )


def near_tolerance(dtype: torch.dtype) -> float:
    """Return the largest norm of a result's error, relative to the result's norm.

    A thousandth in float32, a hundredth in a 16-bit dtype.
    """
    return 1e-3 if dtype == torch.float32 else 1e-2


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Check that two results agree: integers exactly, floating point within `assert_near`.

    Raises:
        WrongResult: If an integer differs, or `assert_near` finds an error.
    """
    if found.is_floating_point():
        assert_near(found, expected)
    else:
        require(torch.equal(found, expected), "whole numbers must be the same, but differ.")


def assert_same_bits(codes: Tensor, states: Tensor, hash_weight: Tensor) -> None:
    """Check hash codes against float64, except for bits whose projection is zero up to rounding.

    Args:
        codes: ``[B, Hkv, n, rbit // 32]`` int32.
        states: ``[B, Hkv, n, d]``.
        hash_weight: ``[Hkv, d, rbit]``.

    Raises:
        WrongResult: If a bit differs although its projection is further from zero than the error
            of ``d`` roundings of its terms.
    """
    exact_states, exact_weight = states.double(), hash_weight.double()
    projected = exact_states @ exact_weight
    terms = exact_states.abs() @ exact_weight.abs()
    noise = gamma(states.shape[-1]) * terms
    shifts = torch.arange(32, device=codes.device)
    bits = (codes.long()[..., None] >> shifts & 1).flatten(-2).bool()
    wrong = (bits != (projected > 0)) & (projected.abs() > noise)
    require(not bool(wrong.any()), f"{int(wrong.sum())} bits must differ only at rounding level.")
