"""Hash codes of keys and queries: the sign bits of a projection, 32 to a word."""

from torch import Tensor

from topkbench.kernels.dispatch import Impl, resolve
from topkbench.kernels.shapes import check_device, check_floating, check_shape


def hash_encode(states: Tensor, hash_weight: Tensor, impl: Impl = "auto") -> Tensor:
    """Encode states as the signs of their projections.

    Bit ``j`` of word ``w`` is ``(states @ hash_weight)[32 * w + j] > 0``, accumulated in float32.
    Another order of summation may turn a bit whose projection is zero up to rounding.

    Args:
        states: ``[B, Hkv, n, d]`` keys, or ``[B, Hkv, G, d]`` queries; any floating dtype.
        hash_weight: ``[Hkv, d, rbit]``, ``rbit`` a multiple of 32.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, Hkv, n, rbit // 32]`` int32.

    Raises:
        ValueError: If a shape does not fit, or ``rbit`` is not a multiple of 32.
        TypeError: If an argument is not floating point.

    Source:
        HATA (arXiv:2506.02572), section 3.
    """
    check_shape("states", states, "[B, Hkv, n, d]", None, None, None, None)
    _, num_heads, _, head_dim = states.shape
    check_shape("hash_weight", hash_weight, "[Hkv, d, rbit]", num_heads, head_dim, None)
    rbit = hash_weight.shape[2]
    if rbit == 0 or rbit % 32:
        raise ValueError(f"hash_weight must have rbit, a positive multiple of 32, got {rbit}.")
    check_floating("states", states)
    check_floating("hash_weight", hash_weight)
    check_device("hash_weight", hash_weight, states.device)
    chosen = resolve("hash_encode", impl, states.device)
    if chosen == "cpu":
        from topkbench.kernels.hash_encode import cpu

        return cpu.hash_encode(states, hash_weight)
    from topkbench.kernels.hash_encode import reference

    return reference.hash_encode(states, hash_weight)
