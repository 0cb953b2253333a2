"""Time the operators and a whole decode step: ``python -m topkbench.kernels.bench``.

Each operator's latency and its share of the memory's measured bandwidth, and one decode step
(encode, score, select, attend) against full attention by SDPA, all timed in turn in one process. A
result is checked against the reference before its time is printed; a wrong one stops the program.
``--experiment NAME`` runs a named experiment over all methods instead: see
`topkbench.kernels.experiments`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topkbench.kernels import experiments
from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.code_score.api import code_score
from topkbench.kernels.dispatch import Impl, resolve
from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.group_softmax.api import group_softmax
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
from topkbench.kernels.timing import OtherLoad, Timing, measure, read_bandwidth, speed_columns
from topkbench.kernels.topk_select.api import topk_select

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PAGE = 16
_RANK = 32
_PARTS, _CENTROIDS = 2, 64  # of a product-quantised key


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
        self.products = self.lowrank()
        self.channel_keys = self.keys.mT.contiguous()
        drawn = torch.rand(*heads, shape.head_dim, generator=draw, device=device)
        self.channels = drawn.topk(_RANK, dim=-1).indices
        self.tables = normal(*heads, _PARTS, shape.group, _CENTROIDS).float()
        named = (*heads, shape.kv_len, _PARTS)
        self.byte_codes = torch.randint(
            _CENTROIDS, named, generator=draw, device=device, dtype=torch.uint8
        )

    def bytes_needed(self) -> dict[str, int]:
        """Return the bytes that each operator cannot do without: what it reads and what it returns.

        Where scores are read more than once, or indices and queries are small, only one reading of
        the large inputs counts.
        """
        chosen = self.indices.numel() * self.shape.head_dim * self.keys.element_size()
        return {
            "hash_encode": self.hash_weight.nbytes,
            "hamming_score": self.key_codes.nbytes + self.scores.nbytes,
            "page_score": self.page_min.nbytes + self.page_max.nbytes + self.pages().nbytes,
            "lowrank_score": self.reduced.nbytes + self.products.nbytes,
            "channel_score": self.reduced.nbytes + self.products.nbytes,
            "code_score": self.byte_codes.nbytes + self.products.nbytes,
            "group_softmax": self.products.nbytes + self.products[:, :, 0].nbytes,
            "topk_select": self.scores.nbytes + self.indices.nbytes,
            "sparse_attention": 2 * chosen,
            "full (sdpa)": self.keys.nbytes + self.values.nbytes,
        }

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

    def channelled(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by a few channels that lie anywhere."""
        states = (self.query[..., :_RANK], self.channel_keys, self.channels)
        return channel_score(*states, impl=impl or self.impl)

    def looked_up(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by product-quantised codes."""
        return code_score(self.tables, self.byte_codes, impl=impl or self.impl)

    def softmaxed(self, impl: Impl | None = None) -> Tensor:
        """Add up the softmax of a group's queries."""
        return group_softmax(self.products, self.scale, impl=impl or self.impl)

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
        rows = self.channel_keys.double()
        exact = channel_score(query, rows, self.channels, impl="reference")
        terms = channel_score(query.abs(), rows.abs(), self.channels, impl="reference")
        assert_within_bound(self.channelled(), exact, gamma(_RANK) * terms)
        assert torch.equal(self.looked_up(), self.looked_up("reference")), "code_score is wrong."
        # exp's argument errs by a few roundings of the logit, its sum by those of its terms.
        largest = 1 + self.products.abs().max().item() * self.scale
        tolerance = 16 * largest * torch.finfo(torch.float32).eps
        weights = self.softmaxed("reference")
        torch.testing.assert_close(self.softmaxed(), weights, rtol=tolerance, atol=0)
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
    memory = read_bandwidth(device)
    print(f"memory: read {memory.read_gb_s:.1f}, copy {memory.copy_gb_s:.1f} GB/s")
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
            step = Step(shape, device, dtype, options.impl)
            _report(step, options, device, memory.ceiling_gb_s)
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


def _report(
    step: Step, options: argparse.Namespace, device: torch.device, bandwidth: float
) -> None:
    """Check one geometry, time it and print its table; ``bandwidth`` is the memory's, in GB/s."""
    step.check()
    shape = step.shape
    ops: dict[str, Callable[[], object]] = {
        "hash_encode": step.encode,
        "hamming_score": step.hamming,
        "page_score": step.pages,
        "lowrank_score": step.lowrank,
        "channel_score": step.channelled,
        "code_score": step.looked_up,
        "group_softmax": step.softmaxed,
        "topk_select": step.select,
        "sparse_attention": step.attend,
    }
    # Full attention first: what it reads leaves nothing of the operators' inputs in the caches.
    timings = measure(
        {"full (sdpa)": step.full, **ops},
        options.trials,
        device=device,
        cuda_graph=options.cuda_graph,
    )
    load = OtherLoad(device)
    pair: dict[str, Callable[[], object]] = {"full (sdpa)": step.full, "decode step": step.decode}
    against = measure(pair, options.trials, device=device, cuda_graph=options.cuda_graph)
    print(
        f"\nB={shape.batch_size} Hkv={shape.num_kv_heads} G={shape.group} d={shape.head_dim} "
        f"rbit={shape.rbit} n={shape.kv_len} k={shape.k}"
    )
    heads = ("p50 ms", "p20 ms", "p80 ms", "MB", "GB/s", "of memory")
    print(f"{'':<18}" + "".join(f"{head:>10}" for head in heads))
    needed = step.bytes_needed()
    for name, timing in timings.items():
        speed = needed[name] / timing.p50_ms / 1e6
        print(
            _line(name, timing)
            + f"{needed[name] / 1e6:>10.2f}{speed:>10.1f}{speed / bandwidth:>10.0%}"
        )
    print(_line("decode step", against["decode step"]))
    full, step_timing = against["full (sdpa)"], against["decode step"]
    found = speed_columns(step_timing.turns, full.turns, load.share())
    ends = "no interval: too few trials"
    if "speedup_ci_low" in found:
        ends = f"95% interval {found['speedup_ci_low']:.1f} to {found['speedup_ci_high']:.1f}"
    print(
        f"speedup of the decode step over full attention, timed in turn: "
        f"{found['speedup_vs_full']:.1f} ({ends}; full attention {full.p50_ms:.3f} ms)"
    )
    if found["timing_note"]:
        print(f"unsteady: {found['timing_note']}")


def _line(name: str, timing: Timing) -> str:
    times = (timing.p50_ms, timing.p20_ms, timing.p80_ms)
    return f"{name:<18}" + "".join(f"{taken:>10.3f}" for taken in times)


if __name__ == "__main__":
    sys.exit(main())
