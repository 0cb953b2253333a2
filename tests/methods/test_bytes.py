"""The bytes of a step by each method's formula, against the reads of the reference counted."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from topkbench.methods.base import AnyMethod, CacheView, Geometry, Index, Policy, StepContext
from topkbench.methods.twilight import Twilight

Make = Callable[..., Any]
N, K = 600, 48
aten = torch.ops.aten
# Tensors of an index that no formula counts: not side information, or no larger than one token's.
UNCOUNTED = {
    "channels",  # Double Sparsity's list of a head's channels
    "mean",  # MagicPIG's mean key
    "prompt_end",  # one number per row
    "ranked",  # SnapKV's selection itself
}
# Bytes that a formula counts and that are in neither index nor cache: rows of the query projection,
# 12 for each of 6 query heads, the channels that random queries and keys choose.
ELSEWHERE = {"infinigen": 6 * 12 * (6 * 32) * 4}
# Zeros that pad a table's 10 columns to 16; the kernel reads them too.
PADDING = {"magicpig": 4 * 32 * 150 * (16 - 10)}
# Operators that use only a tensor's shape.
UNREAD = {"new_zeros", "new_empty", "new_full", "zeros_like", "ones_like", "empty_like"}


class Meter(TorchDispatchMode):
    """Counts the bytes of an index and a cache that torch's operators read.

    Side information counts once per step. Keys and values count once in each operator that reads
    them, for all its queries: a key that is scored and then attended to is read twice. What is
    looked up by entry, such as hash tables, counts each time.
    """

    def __init__(self, index: Index, cache: CacheView) -> None:
        super().__init__()
        self.cached = {one.untyped_storage().data_ptr() for one in cache_states(cache)}
        watched = [*cache_states(cache), *side_information(index)]
        self.seen = {
            one.untyped_storage().data_ptr(): torch.zeros(
                one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool
            )
            for one in watched
        }
        self.sizes = {one.untyped_storage().data_ptr(): one.element_size() for one in watched}
        self.repeated = 0

    @property
    def bytes(self) -> int:
        """Bytes read since the meter was created."""
        once = sum(int(seen.sum()) * self.sizes[at] for at, seen in self.seen.items())
        return once + self.repeated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name.removeprefix("aten::") in UNREAD:
            return out
        named = {argument.name: argument for argument in func._schema.arguments}
        given = dict(zip(named, args, strict=False)) | (kwargs or {})
        for name, value in given.items():
            alias = named[name].alias_info
            if alias is not None and alias.is_write:
                continue
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, Tensor) and one.untyped_storage().data_ptr() in self.seen:
                    self._read(func, one, args)
        return out

    def _read(self, func: Any, one: Tensor, args: Any) -> None:
        at = one.untyped_storage().data_ptr()
        places = torch.arange(len(self.seen[at]))
        places = places.as_strided(one.shape, one.stride(), one.storage_offset())
        if func is aten.index.Tensor:
            chosen = tuple(slice(None) if part is None else part for part in args[1])
            self.repeated += places[chosen].numel() * self.sizes[at]
            return
        if func is aten.gather.default:
            places = places.gather(args[1], args[2])
        if at in self.cached:
            self.repeated += places.unique().numel() * self.sizes[at]
        else:
            self.seen[at][places.flatten()] = True


def cache_states(cache: CacheView) -> list[Tensor]:
    return [cache.key_states, cache.value_states]


def side_information(index: Index) -> list[Tensor]:
    """Return the tensors of an index and of indices inside it, except those not counted."""
    found: list[Tensor] = []
    for one in fields(index):
        value = getattr(index, one.name)
        if isinstance(value, Index):
            found += side_information(value)
        elif one.name not in UNCOUNTED:
            values = value if isinstance(value, list) else [value]
            found += [tensor for tensor in values if isinstance(tensor, Tensor)]
    return found


@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_bytes_of_a_step_equal_the_reads_counted(
    name: str, make_method: Make, states: Make, build: Make, geometry: Geometry, protocol: Any
) -> None:
    inner = {"base": {"impl": "reference"}} if name == "twilight" else {}
    plain = {} if name == "full" else {"impl": "reference"}
    method: AnyMethod = make_method(name, **plain, **inner)
    method, policy = method.resolve(Policy(k=K, protocol=protocol))
    # The reference reads the first slot for padding; keep it, so that this adds no read.
    policy = replace(policy, num_sink=max(1, policy.num_sink))
    if isinstance(method, Twilight):  # whose base has its own policy
        method.base.native = {**method.base.native, "num_sink": 1}
    queries, keys, values = states(1, N)
    index = build(method, keys[:, :, : N - 2], values[:, :, : N - 2], capacity=N)

    def step(n: int, newest: tuple[Tensor, Tensor]) -> Any:
        view = CacheView(keys[:, :, :n], values[:, :, :n])
        method.append(index, *newest)
        return method.step(index, StepContext(queries, view, policy, 32**-0.5))

    # The new token's own states come from the layer, not from the cache.
    tokens = [(keys[:, :, [at]].clone(), values[:, :, [at]].clone()) for at in (N - 2, N - 1)]
    step(N - 1, tokens[0])  # a first step may do extra work
    with Meter(index, CacheView(keys, values)) as meter:
        result = step(N, tokens[1])
    counted = meter.bytes + ELSEWHERE.get(name, 0) - PADDING.get(name, 0)
    if not method.selects:
        assert counted == method.bytes_read(geometry, N, N)
        return
    selection, view = result.selection, CacheView(keys, values)
    assert selection is not None
    read, scanned = selection.tokens_read(view).sum().item(), selection.scanned
    # The heads' mean need not be a whole number; the formula is linear, so interpolate.
    expected = 0.0
    for up in (0, 1):
        walked = None if scanned is None else (int(scanned.sum()) + up) // 2
        expected += method.bytes_read(geometry, N, (read + up) // 2, walked) / 2
    assert counted == expected
