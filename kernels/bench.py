"""Time the operators and a whole decode step: ``python -m topkbench.kernels.bench``.

Prints each operator's latency and the fraction of the measured memory bandwidth that it reaches,
and compares one decode step (encode, score, select, attend) with full attention by SDPA. All are
timed alternately in one process. Each result is checked against the reference before its time is
printed; a wrong one stops the program. ``--experiment NAME`` runs a named experiment over all
methods instead: see `topkbench.kernels.experiments`.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from topkbench.kernels import experiments
from topkbench.kernels.dispatch import resolve
from topkbench.kernels.operators import Geometry, Operators
from topkbench.kernels.steps import METHODS
from topkbench.kernels.testing import WrongResult
from topkbench.kernels.timing import OtherLoad, Timing, measure, read_bandwidth, speed_columns

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
            operators = Operators(shape, device, dtype, options.impl)
            _report(operators, options, device, memory.ceiling_gb_s)
        except WrongResult as error:
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
    named = parser.add_argument_group("named experiments", "options that override the experiment's")
    named.add_argument("--experiment", choices=tuple(experiments.EXPERIMENTS))
    named.add_argument("--methods", nargs="+", choices=tuple(METHODS))
    named.add_argument("--geometry", nargs="+", choices=tuple(experiments.GEOMETRIES))
    named.add_argument("--lengths", type=int, nargs="+", help="cached tokens at batch 1")
    named.add_argument("--batch-sizes", type=int, nargs="+", help="at 32,768 tokens")
    named.add_argument("--out", metavar="FILE.csv", help="file to write the rows to")
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
    operators: Operators, options: argparse.Namespace, device: torch.device, bandwidth: float
) -> None:
    """Check one geometry, time it and print its table; ``bandwidth`` is the memory's in GB/s."""
    operators.check()
    shape, calls = operators.shape, operators.calls()
    # Full attention first: it reads so much that it evicts the operators' inputs from the caches.
    timings = measure(
        {"full_attention": calls.pop("full_attention"), **calls},
        options.trials,
        device=device,
        cuda_graph=options.cuda_graph,
    )
    load = OtherLoad(device)
    pair = {"full_attention": operators.full, "decode step": operators.decode}
    against = measure(pair, options.trials, device=device, cuda_graph=options.cuda_graph)
    print(
        f"\nB={shape.batch_size} Hkv={shape.num_kv_heads} G={shape.group} d={shape.head_dim} "
        f"rbit={shape.rbit} n={shape.kv_len} k={shape.k}"
    )
    heads = ("p50 ms", "p20 ms", "p80 ms", "MB", "GB/s", "of memory")
    print(f"{'':<18}" + "".join(f"{head:>10}" for head in heads))
    needed = operators.bytes_needed()
    for name, timing in timings.items():
        speed = needed[name] / timing.p50_ms / 1e6
        print(
            _line(name, timing)
            + f"{needed[name] / 1e6:>10.2f}{speed:>10.1f}{speed / bandwidth:>10.0%}"
        )
    print(_line("decode step", against["decode step"]))
    full, step_timing = against["full_attention"], against["decode step"]
    columns = speed_columns(step_timing.turns, full.turns, load.share())
    interval = "no interval: too few trials"
    if "speedup_ci_low" in columns:
        low, high = columns["speedup_ci_low"], columns["speedup_ci_high"]
        interval = f"95% interval {low:.1f} to {high:.1f}"
    print(
        f"speedup of the decode step over full attention, timed alternately: "
        f"{columns['speedup_vs_full']:.1f} ({interval}; full attention {full.p50_ms:.3f} ms)"
    )
    if columns["timing_note"]:
        print(f"unsteady: {columns['timing_note']}")


def _line(name: str, timing: Timing) -> str:
    times = (timing.p50_ms, timing.p20_ms, timing.p80_ms)
    return f"{name:<18}" + "".join(f"{taken:>10.3f}" for taken in times)


if __name__ == "__main__":
    sys.exit(main())
