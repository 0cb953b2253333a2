"""Time the operators and a whole decode step: ``python -m topkbench.kernels.bench``.

Two tables: each operator's latency, and one decode step (encode, score, select, attend) against
full attention by SDPA, timed in turn in one process. A result is checked against the reference
before its time is printed; a wrong one stops the program. ``--experiment NAME`` runs a named
experiment over all methods instead: see `topkbench.kernels.experiments`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topkbench.kernels import experiments
from topkbench.kernels.dispatch import Impl, resolve
from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import hash_encode
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.steps import METHODS
from topkbench.kernels.testing import (
    assert_attended,
    assert_same_bits,
    assert_same_selection,
    assert_within_bound,
    gamma,
)
from topkbench.kernels.timing import Timing, measure, read_bandwidth
from topkbench.kernels.topk_select.api import topk_select

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PAGE = 16
_RANK = 32


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shapes of one decode step."""

    batch_size: int
    num_kv_heads: int
    group: int
    head_dim: int
    rbit: int
    kv_len: int
    k: int


class Step:
    """One layer's random states, codes and pages, and the operators that work on them.

    Args:
        shape: The shapes.
        device: Where everything lies.
        dtype: Of queries, keys and values.
        impl: Which implementation runs.
    """

    def __init__(
        self, shape: Geometry, device: torch.device, dtype: torch.dtype, impl: Impl
    ) -> None:
        self.shape, self.impl = shape, impl
        draw = torch.Generator(device).manual_seed(0)
        heads = (shape.batch_size, shape.num_kv_heads)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=draw, device=device).to(dtype)

        self.query = normal(*heads, shape.group, shape.head_dim)
        self.keys = normal(*heads, shape.kv_len, shape.head_dim)
        self.values = normal(*heads, shape.kv_len, shape.head_dim)
        self.hash_weight = normal(shape.num_kv_heads, shape.head_dim, shape.rbit).float()
        self.key_codes = hash_encode(self.keys, self.hash_weight, impl=impl)
        self.query_codes = hash_encode(self.query, self.hash_weight, impl=impl)
        self.scores = hamming_score(self.query_codes, self.key_codes, impl=impl)
        self.indices = topk_select(self.scores, shape.k, impl=impl)
        self.scale = shape.head_dim**-0.5
        whole = self.keys[:, :, : shape.kv_len // _PAGE * _PAGE].unflatten(2, (-1, _PAGE))
        self.page_min, self.page_max = whole.amin(3), whole.amax(3)
        # As a reduced cache holds them: a tensor of its own, not a view of all channels.
        self.reduced = self.keys[..., :_RANK].contiguous()

    def encode(self, impl: Impl | None = None) -> Tensor:
        """Encode the queries."""
        return hash_encode(self.query, self.hash_weight, impl=impl or self.impl)

    def hamming(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by their codes."""
        return hamming_score(self.query_codes, self.key_codes, impl=impl or self.impl)

    def pages(self, impl: Impl | None = None) -> Tensor:
        """Score all pages."""
        return page_score(self.query, self.page_min, self.page_max, impl=impl or self.impl)

    def lowrank(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by a few channels."""
        return lowrank_score(self.query[..., :_RANK], self.reduced, impl=impl or self.impl)

    def select(self, impl: Impl | None = None) -> Tensor:
        """Select k keys of each head."""
        return topk_select(self.scores, self.shape.k, impl=impl or self.impl)

    def attend(self, impl: Impl | None = None) -> Tensor:
        """Attend to the selected keys."""
        out, _ = sparse_attention(
            self.query.flatten(1, 2),
            self.keys,
            self.values,
            self.indices,
            self.scale,
            impl=impl or self.impl,
        )
        return out

    def decode(self) -> Tensor:
        """Run the decode step from the query to the output."""
        codes = hash_encode(self.query, self.hash_weight, impl=self.impl)
        scores = hamming_score(codes, self.key_codes, impl=self.impl)
        indices = topk_select(scores, self.shape.k, impl=self.impl)
        query = self.query.flatten(1, 2)
        states = (query, self.keys, self.values)
        out, _ = sparse_attention(*states, indices, self.scale, impl=self.impl)
        return out

    def full(self) -> Tensor:
        """Attend to all keys by SDPA."""
        return full_attention(self.query.flatten(1, 2), self.keys, self.values, self.scale)

    def check(self) -> None:
        """Check every operator against its reference.

        Raises:
            AssertionError: If a result is wrong; no time of it means anything then.
        """
        assert_same_bits(self.key_codes, self.keys, self.hash_weight)
        assert_same_bits(self.encode(), self.query, self.hash_weight)
        assert torch.equal(self.hamming(), self.hamming("reference")), "hamming_score is wrong."
        assert_same_selection(self.select(), self.select("reference"), self.scores)
        assert torch.equal(self.select(), self.select("reference")), "topk_select breaks ties."
        query, low, high = self.query.double(), self.page_min.double(), self.page_max.double()
        exact = page_score(query, low, high, impl="reference")
        extreme = torch.maximum(low.abs(), high.abs())
        terms = page_score(query.abs(), extreme, extreme, impl="reference")
        assert_within_bound(self.pages(), exact, gamma(self.shape.head_dim) * terms)
        query, keys = query[..., :_RANK], self.reduced.double()
        exact = lowrank_score(query, keys, impl="reference")
        terms = lowrank_score(query.abs(), keys.abs(), impl="reference")
        assert_within_bound(self.lowrank(), exact, gamma(_RANK) * terms)
        states = (self.query.flatten(1, 2), self.keys, self.values, self.indices, self.scale)
        assert_attended(self.attend(), None, *states)
        assert_attended(self.decode(), None, *states)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, print the tables and return the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = _DTYPES[options.dtype]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.experiment:
        return _experiment(options, device, dtype)
    chosen = {op: resolve(op, options.impl, device) for op in ("hamming_score", "topk_select")}
    print(f"device {device}, {options.dtype}, {torch.get_num_threads()} threads, {chosen}")
    if options.bandwidth:
        bandwidth = read_bandwidth(device)
        print(f"memory: read {bandwidth.read_gb_s:.1f}, copy {bandwidth.copy_gb_s:.1f} GB/s")
    for kv_len in options.kv_len:
        shape = Geometry(
            batch_size=options.batch_size,
            num_kv_heads=options.kv_heads,
            group=options.group,
            head_dim=options.head_dim,
            rbit=options.rbit,
            kv_len=kv_len,
            k=options.k or max(1, kv_len // 64),
        )
        try:
            _report(Step(shape, device, dtype, options.impl), options, device)
        except AssertionError as error:
            print(f"wrong result, no times: {error}", file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topkbench.kernels.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--kv-len", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rbit", type=int, default=128)
    parser.add_argument("--k", type=int, help="default: kv_len / 64")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--impl", choices=("auto", "reference", "cpu", "triton"), default="auto")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--cuda-graph", action="store_true", help="time graph replays")
    parser.add_argument("--bandwidth", action="store_true", help="measure the memory first")
    named = parser.add_argument_group("named experiments", "their settings, where not the own ones")
    named.add_argument("--experiment", choices=tuple(experiments.EXPERIMENTS))
    named.add_argument("--methods", nargs="+", choices=tuple(METHODS))
    named.add_argument("--geometry", nargs="+", choices=tuple(experiments.GEOMETRIES))
    named.add_argument("--lengths", type=int, nargs="+", help="cached tokens at batch 1")
    named.add_argument("--batch-sizes", type=int, nargs="+", help="at 32,768 tokens")
    named.add_argument("--out", metavar="FILE.csv", help="where the rows go")
    return parser


def _experiment(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Run a named experiment, write its rows and return the exit status."""
    try:
        experiment = experiments.chosen(
            options.experiment,
            geometries=options.geometry,
            lengths=options.lengths,
            batch_sizes=options.batch_sizes,
            methods=options.methods,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    conditions = experiments.Conditions(
        device=device,
        dtype=dtype,
        impl=options.impl,
        rbit=options.rbit,
        trials=options.trials,
        cuda_graph=options.cuda_graph,
    )
    rows = experiments.run(experiment, conditions)
    if options.experiment == "break_even":
        print("\n" + "\n".join(experiments.faster_from(rows)))
    if options.out:
        experiments.write(rows, options.out)
    return 1 if any(row["status"] == "wrong" for row in rows) else 0


def _report(step: Step, options: argparse.Namespace, device: torch.device) -> None:
    """Check one geometry, time it and print its table."""
    step.check()
    shape = step.shape
    ops: dict[str, Callable[[], object]] = {
        "hash_encode": step.encode,
        "hamming_score": step.hamming,
        "page_score": step.pages,
        "lowrank_score": step.lowrank,
        "topk_select": step.select,
        "sparse_attention": step.attend,
    }
    pair: dict[str, Callable[[], object]] = {"decode step": step.decode, "full (sdpa)": step.full}
    timings = measure(ops, options.trials, device=device, cuda_graph=options.cuda_graph)
    against = measure(pair, options.trials, device=device, cuda_graph=options.cuda_graph)
    print(
        f"\nB={shape.batch_size} Hkv={shape.num_kv_heads} G={shape.group} d={shape.head_dim} "
        f"rbit={shape.rbit} n={shape.kv_len} k={shape.k}"
    )
    print(f"{'':<18}{'p50 ms':>10}{'p20 ms':>10}{'p80 ms':>10}")
    for name, timing in {**timings, **against}.items():
        print(_line(name, timing))
    speedup = against["full (sdpa)"].p50_ms / against["decode step"].p50_ms
    print(f"speedup of the decode step over full attention: {speedup:.1f}")


def _line(name: str, timing: Timing) -> str:
    times = (timing.p50_ms, timing.p20_ms, timing.p80_ms)
    return f"{name:<18}" + "".join(f"{taken:>10.3f}" for taken in times)


if __name__ == "__main__":
    sys.exit(main())
