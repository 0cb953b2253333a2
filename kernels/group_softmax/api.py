"""One score per unit for a group of queries: the attention weight from their logits."""

from typing import Literal

from torch import Tensor

from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.group_softmax import reference
from topkbench.kernels.shapes import check_floating, check_shape, check_sinks

Rule = Literal["sum", "max"]


def group_softmax(
    scores: Tensor,
    scale: float,
    rule: Rule = "sum",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Reduce the logits of a group's queries to one score per KV head.

    Each query's logits become its softmax over the units; the softmaxes are summed, or their
    maximum is taken, so that no query dominates by the norm of its vector.

    Args:
        scores: ``[B, Hkv, G, U]`` dot products; -inf marks an absent unit.
        scale: Factor on the dot products.
        rule: ``"sum"`` or ``"max"`` over the group.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        sinks: ``[Hkv * G]`` floating point, the logit of each query head's learned sink, which is
            in its softmax's denominator, unscaled and uncapped; None for no sinks.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, Hkv, U]`` float32 (float64 from the reference if the scores are); 0 for an absent
        unit.

    Raises:
        ValueError: If a shape or device does not fit, or ``rule`` or ``softcap`` is out of range.
        TypeError: If the scores or sinks are not floating point.
    """
    check_shape("scores", scores, "[B, Hkv, G, U]", None, None, None, None)
    check_floating("scores", scores)
    if rule not in ("sum", "max"):
        raise ValueError(f"rule must be sum or max, got {rule!r}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}.")
    check_sinks(sinks, scores.shape[1] * scores.shape[2], scores.device)
    run = implementation(reference.group_softmax, impl, scores.device)
    return run(scores, scale, rule, softcap, sinks)
