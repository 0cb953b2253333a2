"""The scripts of README and docs and their example method run as printed; that method can stay."""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from topkbench.harness.main import command_on_results

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "models", "harness", "analysis", "tasks", "tools")


def blocks(document: str) -> list[str]:
    """Return the blocks of code that a document prints."""
    text = (ROOT / document).read_text()
    return re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readmes_links_lead_to_files_and_headings_that_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", text)
    assert len(links) > 40
    assert [path for path, _ in links if not (ROOT / path).exists()] == []
    for path, anchor in links:
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M) if anchor else [""]
        assert anchor in [one.lower().replace(" ", "-") for one in headings], f"{path}#{anchor}"


def test_the_script_that_readme_prints_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what its last line says."""
    (script,) = blocks("README.md")
    exec(compile(script, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == script.rpartition("  # ")[2].strip()


def test_the_scripts_that_docs_print_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second goes on from the first, and each prints what its last line says."""
    monkeypatch.chdir(tmp_path)
    scripts = blocks("docs/scripts.md")
    assert len(scripts) == 2
    names: dict[str, Any] = {}
    for script in scripts:
        exec(compile(script, "docs/scripts.md", "exec"), names)
        assert capsys.readouterr().out.strip() == script.rpartition("  # ")[2].strip()
    assert names["method"].artifact_digest
    whole = names["tokenizer"](names["text"] + names["question"], return_tensors="pt")

    def ask_in_one_forward(num_tokens: int) -> Any:
        with names["attach"](names["model"], names["method"], names["Policy"](k=256)) as session:
            context = names["tokenizer"](names["text"], return_tensors="pt")
            cache = names["model"](**context).past_key_values
            copied = copy.deepcopy(cache)
            names["model"].generate(**whole, past_key_values=copied, max_new_tokens=num_tokens)
        return session.count.taken[0]

    context = names["tokenizer"](names["text"], return_tensors="pt")["input_ids"].shape[1]
    asked = whole["input_ids"].shape[1] - context
    for num_tokens in (1, 3):  # the question's tokens, and all of the answer's but the last
        assert ask_in_one_forward(num_tokens) == asked + num_tokens - 1
    assert list(tmp_path.iterdir()) == []  # the artifact ships with the model: nothing was fitted


def test_the_commands_on_results_that_docs_print_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "analysis").symlink_to(ROOT / "analysis")
    measured = ROOT / "analysis" / "measured" / "epyc_2_threads" / "stage_breakdown.csv"
    for name in ("before", "after"):
        (tmp_path / "results" / name).mkdir(parents=True)
        shutil.copy(measured, tmp_path / "results" / name / "rows.csv")
    text = (ROOT / "docs" / "results.md").read_text()
    found = re.findall(r"^topkbench (export|compare) (.+)$", text, re.MULTILINE)
    assert {name for name, _ in found} == {"export", "compare"}
    for name, arguments in found:
        command = command_on_results(name)
        assert command is not None
        assert command(shlex.split(arguments)) == 0
    assert (tmp_path / "paper" / "results.tex").stat().st_size > 0


@pytest.mark.slow
def test_the_method_that_docs_add_passes_the_contract_as_printed(tmp_path: Path) -> None:
    """In a checkout with this method and full attention alone, the contract tests run over it."""
    code, settings = blocks("docs/add_a_method.md")
    for folder in LINKED:
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    shutil.copytree(ROOT / "methods", tmp_path / "methods")
    (tmp_path / "methods" / "mine.py").write_text(code)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(settings)
    shutil.copy(ROOT / "conf" / "method" / "full.yaml", tmp_path / "conf" / "method")
    (tmp_path / ".types").mkdir()
    (tmp_path / ".types" / "topkbench").symlink_to("..", target_is_directory=True)
    (tmp_path / "tests" / "methods").mkdir(parents=True)
    contract = ("methods/conftest.py", "methods/test_contract.py")
    for name in ("conftest.py", "fixtures.py", *contract):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {name: one for name, one in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-k", "mine"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 30


@pytest.mark.slow
def test_a_method_stays_in_the_repository_with_two_files_and_a_run_of_the_tool(
    tmp_path: Path,
) -> None:
    """In a copy of the checkout, the tool writes the documents, and what checks methods passes."""
    code, settings = blocks("docs/add_a_method.md")
    sections = (
        "\n\n    Source:\n        None: it is an example."
        "\n\n    Compared with the authors' code:\n        None to compare with: it is an example."
    )
    sentence = "Keep the tokens whose keys are longest."
    # The folders that find their root, and that of the documents.
    for folder in ("analysis", "conf", "docs", "harness", "methods", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for folder in ("kernels", "models", "tasks"):
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    (tmp_path / ".types").mkdir()
    (tmp_path / ".types" / "topkbench").symlink_to("..", target_is_directory=True)
    checks = ("conf/test_compose.py", "analysis/test_style.py", "tools/test_docs.py")
    files = [f"tests/{name}" for name in ("test_layout.py", *checks)]
    shared = ("tests/conftest.py", "tests/fixtures.py")
    for name in (*shared, *files, "README.md", "pyproject.toml", "run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    mine = code.replace(f'"""{sentence}"""', f'"""{sentence}{sections}\n    """')
    (tmp_path / "methods" / "mine.py").write_text(mine)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(settings)
    tests = ["-n0", "-p", "no:cacheprovider", *files]
    tests += [
        "-k",
        "test_layout and not architecture or test_style or mine or test_docs and method",
    ]
    # In one process, which imports torch once.
    program = f"""
import runpy, sys
import pytest
runpy.run_path("tools/make_methods.py", run_name="__main__")
sys.exit(pytest.main({tests!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={name: one for name, one in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    idea = "Keep the tokens whose keys are longest"
    listed = f"| [`mine`](docs/methods/mine.md) | {idea} |  |\n"
    assert listed in (tmp_path / "README.md").read_text()
    row = f"| [`mine`](methods/mine.md) | {idea} |  | 1 value, the key's length |  |\n"
    assert row in (tmp_path / "docs" / "methods.md").read_text()
    page = (tmp_path / "docs" / "methods" / "mine.md").read_text()
    assert page.startswith("# Longest keys\n")
    assert "## Measured" not in page
