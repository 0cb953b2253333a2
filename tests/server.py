"""Runs the command in processes forked from this one, which has imported the libraries.

Each line of its input is a job in JSON: ``script``, ``arguments``, ``cwd``, ``env``, ``before``
(code that runs first), ``figures`` (whether a report's figures are drawn; else their files are
empty), and the files ``out``, ``err`` and ``forwards`` (a line for each prompt that is prefilled).
It prints the process id when the process has begun, and its exit status when it has ended. A job
times fewer steps and reads less memory than a user's command.
"""

import gc
import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

gc.disable()  # until all is imported and prepared, of which nothing is garbage

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
import wandb.sdk.launch  # noqa: E402, F401
from hydra import compose, initialize_config_dir  # noqa: E402
from numba.core.registry import cpu_target  # noqa: E402
from optuna.samplers import TPESampler  # noqa: E402, F401
from optuna.storages import RDBStorage  # noqa: E402, F401

import topkbench.analysis.report.sweep_report  # noqa: E402, F401
from topkbench.analysis import style  # noqa: E402
from topkbench.analysis.figures import plots  # noqa: E402
from topkbench.harness import runner, speed  # noqa: E402
from topkbench.harness.main import CONF  # noqa: E402
from topkbench.harness.sources import ROOT, code_digest  # noqa: E402
from topkbench.kernels import timing  # noqa: E402
from topkbench.models.load import load_model  # noqa: E402
from topkbench.models.prefill_store import PrefillStore  # noqa: E402


def prepare() -> None:
    """Do what every process does once, without starting a thread, which a fork would lose."""
    load_model("tiny", "tiny")
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("config")
    found = [path for name in ("methods", "tasks") for path in (ROOT / name).glob("[!_]*.py")]
    modules = [f"topkbench.{path.parent.name}.{path.stem}" for path in found]
    for name in modules:
        importlib.import_module(name)
    code_digest(["topkbench.harness.run", *modules])
    style.shipped()
    with plt.rc_context(style.RC_PARAMS), tempfile.TemporaryDirectory() as folder:
        figure = plt.Figure()
        figure.subplots().set_xlabel("text")
        plots.save(figure, pd.DataFrame(), plots.Drawn("any", "", "", Path(folder)))
    tempfile.tempdir = None  # a job has a folder of its own
    gc.collect()
    gc.freeze()  # else each process would visit all of these objects again
    gc.enable()


def save_nothing(figure: object, data: object, drawn: plots.Drawn) -> plots.Drawn:
    for path in (drawn.png, drawn.svg, drawn.csv):
        path.write_text('<svg viewBox="0 0 1 1"></svg>')
    return drawn


def run(job: dict[str, Any]) -> NoReturn:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdout = os.fdopen(1, "w", encoding=encoding)
    sys.stderr = os.fdopen(2, "w", encoding=encoding, errors="backslashreplace")
    sys.argv = [job["script"], *job["arguments"]]
    computed = PrefillStore.compute_states

    def counted(store: Any, token_ids: Any, *needs: Any) -> Any:
        with Path(job["forwards"]).open("a") as file:
            file.write(json.dumps(list(token_ids)) + "\n")
        return computed(store, token_ids, *needs)

    PrefillStore.compute_states = counted
    speed.WARM_UP_STEPS, speed.TIMED_STEPS = 1, 2
    timing._PROBE_BYTES = 2**20
    runner.load_warning = lambda: None  # what is printed does not depend on other processes
    if not job["figures"]:
        plots.save = save_nothing
    status: Any = 0
    try:
        exec(job["before"], globals())
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


prepare()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
gc.unfreeze()
