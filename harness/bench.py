"""Time decode steps and operators of single layers: ``python -m topkbench.harness.bench``.

Prints each operator's latency and the fraction of the measured memory bandwidth that it reaches,
and compares HATA's decode step with full attention by SDPA: once composed of the operators alone,
and once as the method runs it. All are timed alternately in one process. Each result is checked
against the reference before its time is printed; a wrong one stops the program.
``--experiment NAME`` times the steps of all methods instead: see `topkbench.harness.experiments`.
Needs only torch, numba and, on a GPU, Triton.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from topkbench.harness import experiments, variants
from topkbench.harness.huge_pages import ask_for_huge_pages
from topkbench.harness.layer import Layer
from topkbench.harness.planted import DTYPES, PlantedStates
from topkbench.kernels.dispatch import Impl, resolve
from topkbench.kernels.operators import Geometry, Operators
from topkbench.kernels.testing import WrongResult
from topkbench.kernels.timing import MemoryProbe, OtherLoad, Timing, measure, speed_columns
from topkbench.methods.base import Policy, with_impl
from topkbench.methods.learning import LearningMethod


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, print the tables and return the exit status."""
    options = _parser().parse_args(arguments)
    ask_for_huge_pages()
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.experiment:
        return _experiment(options, device, dtype)
    chosen = {op: resolve(op, options.impl, device) for op in ("hamming_score", "topk_select")}
    print(f"device {device}, {options.dtype}, {torch.get_num_threads()} threads, {chosen}")
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
            _report(operators, options, device)
        except WrongResult as error:
            print(f"wrong result, no times: {error}", file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topkbench.harness.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--kv-len", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rbit", type=int, default=128)
    parser.add_argument("--k", type=int, help="default: kv_len / 64")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--impl", choices=("auto", "reference", "cpu", "triton"), default="auto")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--cuda-graph", action="store_true", help="time graph replays")
    named = parser.add_argument_group("named experiments", "options that override the experiment's")
    named.add_argument("--experiment", choices=tuple(experiments.EXPERIMENTS))
    named.add_argument("--methods", nargs="+", choices=variants.names())
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
    return 1 if any(row["status"] in ("wrong", "failed") for row in rows) else 0


def _report(operators: Operators, options: argparse.Namespace, device: torch.device) -> None:
    """Check one geometry, time it in turn with the memory's bandwidth, and print its table."""
    operators.check()
    shape, calls = operators.shape, operators.calls()
    probe = MemoryProbe(device)
    first = calls.pop("full_attention")
    # Full attention before the operators: it evicts their inputs from the caches. Before it, once
    # more: torch's threads, which copy the memory, stay busy for some time after they are done.
    timings = measure(
        {**probe.calls, "untimed": first, "full_attention": first, **calls},
        options.trials,
        device=device,
        cuda_graph=options.cuda_graph,
    )
    print(
        f"\nB={shape.batch_size} Hkv={shape.num_kv_heads} G={shape.group} d={shape.head_dim} "
        f"rbit={shape.rbit} n={shape.kv_len} k={shape.k}"
    )
    memory = probe.bandwidth(timings)
    print(f"memory: read {memory.read_gb_s:.1f}, copy {memory.copy_gb_s:.1f} GB/s")
    heads = ("p50 ms", "p20 ms", "p80 ms", "MB", "GB/s", "of memory")
    print(f"{'':<18}" + "".join(f"{head:>10}" for head in heads))
    needed = operators.bytes_needed()
    for name, timing in timings.items():
        if name not in needed:
            continue
        speed = needed[name] / timing.p50_ms / 1e6
        reached = speed / memory.ceiling_gb_s
        print(_line(name, timing) + f"{needed[name] / 1e6:>10.2f}{speed:>10.1f}{reached:>10.0%}")
    layer = hata_layer(operators, options.impl)
    mismatch = layer.mismatch()
    if mismatch is not None:
        raise WrongResult(f"HATA: {mismatch}")
    load = OtherLoad(device)
    # Full attention before each step: the steps select the same tokens, which must not be cached.
    steps = {
        **{"full_attention": operators.full, "decode step": operators.decode},
        **{"full again": operators.full, "HATA's step": lambda: layer.step().out},
    }
    taken = measure(steps, options.trials, device=device, cuda_graph=options.cuda_graph)
    share = load.share()
    full, alone, again, method = taken.values()
    print(_line("decode step", alone))
    print(_line("HATA's step", method))
    _print_ratio("speedup of the decode step over full attention", alone, full, share)
    _print_ratio("speedup of HATA's step over full attention", method, again, share)
    _print_ratio("speedup of the decode step over HATA's step", alone, method, share)


def hata_layer(operators: Operators, impl: Impl) -> Layer:
    """Return HATA's layer over the operators' states, with their hash weights and no forced tokens.

    Its step does the work of ``operators.decode``: both score by whole numbers.
    """
    method = variants.make("hata_integer", rbit=operators.shape.rbit, weights="trained")
    assert isinstance(method, LearningMethod)
    method.load_artifact({"hash_weight": operators.hash_weight[None]})
    policy = Policy(k=operators.shape.k, num_sink=0, num_recent=0)
    states = PlantedStates(operators.query, operators.keys, operators.values)
    return Layer(with_impl(method, impl), policy, states)


def _print_ratio(what: str, step: Timing, other: Timing, load: float | None) -> None:
    """Print how many times as fast as another step a step is; both were timed alternately."""
    columns: Mapping[str, Any] = speed_columns(step.turns, other.turns, load)
    interval = "no interval: too few trials"
    if "speedup_ci_low" in columns:
        low, high = columns["speedup_ci_low"], columns["speedup_ci_high"]
        interval = f"95% interval {low:.2f} to {high:.2f}"
    print(
        f"{what}, timed alternately: {columns['speedup_vs_full']:.2f} ({interval}; "
        f"{other.p50_ms:.3f} ms)"
    )
    if columns["timing_note"]:
        print(f"unsteady: {columns['timing_note']}")


def _line(name: str, timing: Timing) -> str:
    times = (timing.p50_ms, timing.p20_ms, timing.p80_ms)
    return f"{name:<18}" + "".join(f"{taken:>10.3f}" for taken in times)


if __name__ == "__main__":
    sys.exit(main())
