"""The states of layers that keep no keys and values: those of hybrid models' other layers.

A layer of linear attention, a state-space model or a short convolution keeps a state of fixed size
for each row, which every token changes. It cannot be cropped, and padding would change it.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

_KEYS_AND_VALUES = {"keys", "values"}


@dataclass(frozen=True)
class LayerState:
    """What a layer of a transformers cache holds besides keys and values.

    Attributes:
        layer: The transformers layer without keys and values, its tensors in host memory. It is
            not written to.
    """

    layer: Any

    @classmethod
    def of(cls, layer: Any) -> Self:
        """Return a copy of the state of a cache's layer, which later tokens do not change."""
        kept = copy.copy(layer)
        attributes = {
            name: one for name, one in vars(layer).items() if name not in _KEYS_AND_VALUES
        }
        vars(kept).clear()
        host = torch.device("cpu")
        vars(kept).update(_merged([attributes], lambda rows: rows[0].to(host, copy=True)))
        return cls(kept)

    @classmethod
    def batch(cls, rows: Sequence["LayerState"]) -> dict[str, Any]:
        """Return the attributes of a layer with a row for each state, copied to its device."""
        device = getattr(rows[0].layer, "device", None) or torch.device("cpu")
        found: dict[str, Any] = _merged(
            [vars(row.layer) for row in rows],
            lambda states: torch.cat([one.to(device) for one in states]),
        )
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        sizes: list[int] = []

        def add(rows: Sequence[Tensor]) -> Tensor:
            sizes.append(rows[0].nbytes)
            return rows[0]

        _merged([vars(self.layer)], add)
        return sum(sizes)


def _merged(rows: Sequence[Any], merge: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Return rows of the same structure as one, whose tensors are merged."""
    first = rows[0]
    if isinstance(first, Tensor):
        return merge(rows)
    if isinstance(first, dict):
        return {name: _merged([row[name] for row in rows], merge) for name in first}
    return first
