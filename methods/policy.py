"""The budget of a decode step and the tokens that are always kept, the same for every method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict, get_args

from torch import Tensor

from topkbench.kernels.dispatch import Impl
from topkbench.kernels.group_softmax.api import Rule, group_softmax

HeadScope = Literal["kv_head", "query_head"]
Aggregation = Literal["native", "sum_softmax", "sum_logit", "max_softmax"]
Protocol = Literal["unified", "native"]
Slice = Annotated[str, "a slice such as '::16'"]
DenseLayers = int | tuple[int, ...] | Slice | None


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Check that a setting is a whole number of at least ``least``.

    Raises:
        ValueError: One sentence that names the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_multiple(name: str, value: object, factor: int) -> None:
    """Check that a setting is a positive multiple of a number.

    Raises:
        ValueError: One sentence that names the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or value % factor:
        raise ValueError(f"{name} must be a positive multiple of {factor}, got {value!r}.")


def check_list(name: str, values: Sequence[object], least: int | None = None) -> None:
    """Check that a setting lists at least one value, and none twice.

    Args:
        name: The setting.
        values: What it lists.
        least: If given, all must be whole numbers of at least this.

    Raises:
        ValueError: One sentence that names the setting.
    """
    if isinstance(values, str) or not values:
        raise ValueError(f"{name} must list at least one value, got {values!r}.")
    for place, value in enumerate(values):
        if least is not None:
            check_whole(name, value, least)
        if value in values[:place]:
            raise ValueError(f"{name} must list each value once, got {value!r} twice.")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The budget of a decode step and the rules around it.

    Attributes:
        k: Tokens kept per selecting head, sinks and recent ones included.
        num_sink: First tokens of the sequence that are always kept.
        num_recent: Last tokens that are always kept, the current one among them.
        dense_layers: Layers that attend to everything: the number of first layers, a list of
            indices, or a Python slice such as ``"::16"`` for every 16th. None means the first 2
            layers if the model has 16 or more, and no layer of a smaller model.
        head_scope: One selection per KV head, shared by its queries, or one per query head.
        aggregation: How the scores of a KV head's queries are reduced to one; ``"native"`` sums
            the float32 softmax of logits, and sums scores that are not logits.
        protocol: ``"unified"`` uses these values; ``"native"`` replaces them by the method's own.
    """

    k: int
    num_sink: int = 4
    num_recent: int = 8
    dense_layers: DenseLayers = None
    head_scope: HeadScope = "kv_head"
    aggregation: Aggregation = "native"
    protocol: Protocol = "unified"

    def __post_init__(self) -> None:
        check_whole("k", self.k)
        check_whole("num_sink", self.num_sink, least=0)
        check_whole("num_recent", self.num_recent, least=0)
        if self.num_sink + self.num_recent > self.k:
            raise ValueError(
                f"num_sink + num_recent must be at most k={self.k}, got {self.num_sink} + "
                f"{self.num_recent}; raise k or lower them."
            )
        _check_choice("head_scope", self.head_scope, get_args(HeadScope))
        _check_choice("aggregation", self.aggregation, get_args(Aggregation))
        _check_choice("protocol", self.protocol, get_args(Protocol))
        if isinstance(self.dense_layers, str):
            _slice(self.dense_layers)
        elif isinstance(self.dense_layers, Sequence):  # a list from YAML
            if not self.dense_layers:
                raise ValueError(
                    "dense_layers must list at least one layer, got []; 0 is for none."
                )
            check_list("dense_layers", self.dense_layers, least=0)
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        elif self.dense_layers is not None:
            check_whole("dense_layers", self.dense_layers, least=0)

    def resolve_dense_layers(self, num_layers: int) -> frozenset[int]:
        """Return the indices of the layers that attend to everything.

        Raises:
            ValueError: If the model has no layer of a listed index, or none that a slice reaches.
        """
        if self.dense_layers is None:
            return frozenset(range(2 if num_layers >= 16 else 0))
        if isinstance(self.dense_layers, int):
            return frozenset(range(min(self.dense_layers, num_layers)))
        if isinstance(self.dense_layers, str):
            reached = frozenset(range(num_layers)[_slice(self.dense_layers)])
            if not reached:
                raise ValueError(
                    f"dense_layers must reach a layer, and {self.dense_layers!r} reaches none of"
                    f" {num_layers}; 0 leaves no layer dense."
                )
            return reached
        for layer in self.dense_layers:
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"dense_layers must lie between 0 and {num_layers - 1}, got {layer}."
                )
        return frozenset(self.dense_layers)


class NativePolicy(TypedDict, total=False):
    """The fields of `Policy` that the native protocol replaces by a method's published values."""

    num_sink: int
    num_recent: int
    dense_layers: DenseLayers
    head_scope: HeadScope
    aggregation: Aggregation


def aggregate(
    scores: Tensor,
    rule: str,
    score_kind: str,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Reduce the scores of a group's queries to one score per KV head.

    Args:
        scores: ``[B, Hkv, G, U]`` float32.
        rule: A value of ``Policy.aggregation``.
        score_kind: ``"logit"`` or ``"count"``.
        scale: The attention's factor on dot products; a softmax is taken of scaled logits.
        softcap: The attention's logit cap, or None.
        sinks: ``[Hkv * G]`` the logits of the attention's learned sinks, or None; they are in the
            denominators of a softmax, so that a head whose sink takes most of the attention counts
            for less.
        impl: Implementation of ``group_softmax``.

    Returns:
        ``[B, Hkv, U]`` float32. An empty row gives zeros under a softmax.
    """
    if sums_scores(rule, score_kind):
        return scores.sum(2)
    reduction: Rule = "max" if rule == "max_softmax" else "sum"
    return group_softmax(scores, scale, reduction, softcap, sinks, impl)


def sums_scores(rule: str, score_kind: str) -> bool:
    """Return whether a group's scores are added up as they are, without a softmax.

    Args:
        rule: As of ``aggregate``, as is ``score_kind``.
        score_kind: See ``rule``.
    """
    return rule == "sum_logit" or (rule == "native" and score_kind != "logit")


def _check_choice(argument: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ValueError(f"{argument} must be one of {', '.join(words)}, got {word!r}.")


def _slice(text: str) -> slice:
    """Parse a slice in Python's notation."""
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
        if len(numbers) not in (2, 3) or numbers[2:] == [0]:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"dense_layers must be a number, a list, or a slice such as '::16', got {text!r}."
        ) from None
    return slice(*numbers)
