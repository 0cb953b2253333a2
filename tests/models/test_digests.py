"""A model's digest changes with every byte and setting that its answers depend on."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CTRLTokenizer

from topkbench.models.digests import model_digest, tokenizer_digest, weights_digest
from topkbench.models.encoding import render_chat
from topkbench.models.load import load_model
from topkbench.models.tiny_tokenizer import build_tokenizer

TINY = Path(__file__).parents[2] / "models" / "tiny"
LARGE = 80 * 2**20


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


def change(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a folder with two sparse shards of 80 MiB, which take no space on disk."""
    folder = tmp_path / "sharded"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    shards = ("model-1.safetensors", "more/model-2.safetensors")
    for name in shards:
        with (folder / name).open("wb") as file:
            file.truncate(LARGE)
    index = {"weight_map": {f"weight {name}": name for name in shards}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["model-1.safetensors", "more/model-2.safetensors"])
def test_one_byte_anywhere_in_a_large_file_counts(sharded: Path, name: str) -> None:
    places = (0, 2**20 + 1, LARGE // 3, 70 * 2**20 + 12345, LARGE - 1)
    before, digests = weights_digest(sharded), set()
    assert len(before) == 16
    for place in places:
        change(sharded / name, place)
        digests.add(weights_digest(sharded))
        change(sharded / name, place)
    assert len(digests - {before}) == len(places)
    assert weights_digest(sharded) == before


def test_the_weights_digest_depends_on_contents_and_not_on_the_folder(copy: Path) -> None:
    digest = weights_digest(TINY)
    assert weights_digest(copy) == digest  # in another folder
    change(copy / "model.safetensors", 4321)
    assert weights_digest(copy) != digest
    change(copy / "model.safetensors", 4321)
    # The same weights under another configuration are another model.
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 777.0
    (copy / "config.json").write_text(json.dumps(config))
    assert weights_digest(copy) != digest


def test_a_cached_hash_is_used_only_for_an_unchanged_file(sharded: Path, tmp_path: Path) -> None:
    path, cache = sharded / "model-1.safetensors", tmp_path / "cache"
    digest = weights_digest(sharded, cache)
    assert not (cache / "hashes").exists()  # so recent that a change may keep the timestamp
    time.sleep(2.1)
    assert weights_digest(sharded, cache) == digest
    notes = sorted((cache / "hashes").iterdir())
    assert len(notes) == 2  # of the shards; small files are read each time
    assert [oct(one.stat().st_mode & 0o777) for one in notes] == ["0o600"] * 2
    assert weights_digest(sharded, cache) == digest
    # A changed byte with the old mtime restored: the ctime reveals it.
    status = path.stat()
    change(path, 50 * 2**20)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert weights_digest(sharded, cache) == weights_digest(sharded) != digest


@pytest.mark.parametrize("damage", ["edited", "cut short", "others may write", "of another file"])
def test_a_cached_hash_that_may_be_forged_is_not_used(
    sharded: Path, tmp_path: Path, damage: str
) -> None:
    cache = tmp_path / "cache"
    time.sleep(2.1)
    digest = weights_digest(sharded, cache)
    first, second = sorted((cache / "hashes").iterdir())
    content = json.loads(first.read_text())
    if damage == "edited":
        content["noted"]["sha256"] = "0" * 64
        first.write_text(json.dumps(content))
    elif damage == "cut short":
        first.write_text(first.read_text()[:-9])
    elif damage == "others may write":
        first.chmod(0o666)
    else:
        shutil.copy(second, first)
    change(sharded / "model-1.safetensors", 5)
    change(sharded / "model-1.safetensors", 5)
    assert weights_digest(sharded, cache) == digest


def test_without_a_writable_cache_folder_the_digest_is_the_same(
    sharded: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    time.sleep(2.1)
    assert weights_digest(sharded, tmp_path / "cache") == weights_digest(sharded)


def settings(path: Path, name: str, **changes: object) -> None:
    content = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**content, **changes}))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda path: change(path / "model.safetensors", 70_000),
    "what ends an answer": lambda path: settings(
        path, "generation_config.json", eos_token_id=[2, 1220]
    ),
    "sampling": lambda path: settings(path, "generation_config.json", repetition_penalty=1.3),
    "the template": lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"),
    "the tokenizer": lambda path: settings(
        path, "tokenizer.json", normalizer={"type": "Lowercase"}
    ),
    "how tokens are joined": lambda path: settings(
        path, "tokenizer_config.json", clean_up_tokenization_spaces=True
    ),
    "the configuration": lambda path: settings(path, "config.json", rms_norm_eps=1e-5),
}


@pytest.mark.parametrize("edit", CHANGES.values(), ids=CHANGES)
def test_the_model_digest_changes_with(copy: Path, edit: Callable[[Path], object]) -> None:
    before = load_model("tiny", str(copy))
    assert model_digest(before) == model_digest(load_model("tiny", str(TINY)))
    edit(copy)
    after = load_model("tiny", str(copy))
    assert model_digest(after) != model_digest(before)


def test_the_weights_digest_excludes_generation_settings(copy: Path) -> None:
    digest = weights_digest(copy)
    settings(copy, "generation_config.json", eos_token_id=1220)
    settings(copy, "tokenizer.json", normalizer={"type": "Lowercase"})
    assert weights_digest(copy) == digest


def test_the_model_digest_includes_dtype_and_prompt_wrapping(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ about }} {{ messages[0].content }}")
    settings: tuple[dict[str, Any], ...] = (
        {},
        {"dtype": "bfloat16"},
        {"chat": True},
        {"chat": True, "chat_template_kwargs": {"about": "Answer."}},
        {"short_answers": True},
    )
    found = {model_digest(load_model("tiny", str(copy), **one)) for one in settings}
    assert len(found) == 5


def test_a_template_that_writes_the_date_gives_the_same_prompts_every_day(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(
        "{{ date_string or strftime_now('%d %b %Y %f') }} {{ messages[0].content }}"
    )
    loaded = load_model("tiny", str(copy), chat=True)
    text, _ = render_chat(loaded.tokenizer, "context", " question", {})
    assert text == "26 Jul 2024 000000 context question"
    assert model_digest(loaded) == model_digest(loaded)
    dated = load_model(
        "tiny", str(copy), chat=True, chat_template_kwargs={"date_string": "1 Jan 2026"}
    )
    assert model_digest(dated) != model_digest(loaded)


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "the tokenizer"])
def test_the_model_digest_changes_with_what_ends_an_answer(copy: Path, place: str) -> None:
    loaded = load_model("tiny", str(copy))
    before = model_digest(loaded)
    if place == "the tokenizer":
        loaded.tokenizer.eos_token = "<pad>"
    else:
        config = loaded.model.config if place == "config.json" else loaded.model.generation_config
        config.eos_token_id = [2, 5]
    assert model_digest(loaded) != before


def test_a_hub_snapshot_counts_every_byte_too(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot in the layout of the hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 39 + "1")
    shutil.copytree(copy, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    before = load_model("tiny", "owner/name")
    assert before.digest == weights_digest(TINY)
    assert model_digest(before) == model_digest(load_model("tiny", "tiny"))
    change(snapshot / "model.safetensors", 70_000)
    assert load_model("tiny", "owner/name").digest != before.digest


def test_the_tokenizer_digest_depends_on_rules_and_template() -> None:
    plain = build_tokenizer([" one", " two"], 64)
    assert tokenizer_digest(plain) == tokenizer_digest(build_tokenizer([" one", " two"], 64))
    other = build_tokenizer([" one", " three"], 64)
    assert tokenizer_digest(plain) != tokenizer_digest(other)
    other = build_tokenizer([" one", " two"], 64)
    other.chat_template = "{{ messages }}"
    assert tokenizer_digest(plain) != tokenizer_digest(other)


def test_the_tokenizer_digest_depends_on_the_merges_of_one_written_in_python(
    tmp_path: Path,
) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a@@": 0, "b": 1, "ab": 2, "<unk>": 3}))
    digests = []
    for merge, expected in (("a b</w>", [2]), ("b a</w>", [0, 1]), ("a b</w>", [2])):
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merge}\n")
        tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
        assert tokenizer.encode("ab") == expected
        digests.append(tokenizer_digest(tokenizer))
    assert digests[0] == digests[2] != digests[1]
