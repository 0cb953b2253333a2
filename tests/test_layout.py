"""Rules of the layout: allowed imports between folders, what is packaged, the README's table."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "methods", "models", "harness", "tasks", "analysis", "tools")
PACKAGED = tuple(folder for folder in FOLDERS if folder != "tools")
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
ENTRY_POINT = ROOT / "harness" / "main.py"
PLAIN_WORDS = {"full", "exact", "random"}  # methods whose names are also English words
TASKS = sorted(path.stem for path in (ROOT / "conf" / "task").glob("*.yaml"))
KERNEL_APIS = tuple(
    f"topkbench.kernels.{path.parent.name}.api" for path in (ROOT / "kernels").glob("*/api.py")
)

CONTRACT = tuple(
    f"topkbench.methods.{name}"
    for name in ("base", "captured", "learning", "policy", "sinks", "softcap", "states")
)
# What each folder may import besides its own modules and the standard library.
ALLOWED = {
    "kernels": ("torch", "triton", "numba", "llvmlite", "numpy"),
    "methods": ("torch", *KERNEL_APIS, "topkbench.kernels.dispatch"),
    "models": (
        *("torch", "transformers", "tokenizers", "safetensors", "filelock", "psutil", "jinja2"),
        *(*KERNEL_APIS, *CONTRACT),
    ),
    "harness": (
        *("torch", "safetensors", "filelock", "psutil", "tqdm"),
        *("topkbench.kernels", "topkbench.models", *CONTRACT),
        "topkbench.analysis.record",
    ),
    "tasks": (
        *("torch", "triton", "psutil", "wonderwords", "pyarrow"),
        *("topkbench.harness", "topkbench.models", "topkbench.methods.base"),
        *(*KERNEL_APIS, "topkbench.kernels.timing", "topkbench.methods.learning"),
    ),
    "analysis": (
        *(
            "numpy",
            "pandas",
            "matplotlib",
            "jinja2",
            "markupsafe",
            "pyarrow",
            "filelock",
            "tabulate",
            "yaml",
        ),
    ),
    "tools": (
        *("torch", "transformers", "tokenizers", "safetensors", "hydra", "omegaconf"),
        *("numpy", "pandas", "matplotlib", "tqdm", "llvmlite"),
        *(f"topkbench.{folder}" for folder in FOLDERS if folder != "tools"),
    ),
}
# What single files may import in addition.
ALLOWED_TO_ONE = {
    "tools/make_families.py": ("topkbench.tests",),
    "kernels/full_attention/libraries.py": ("flash_attn", "flash_attn_interface", "flashinfer"),
    "methods/magicpig.py": ("numpy",),
    "tools/site.py": ("mkdocs",),
    "harness/main.py": (
        *("hydra", "omegaconf", "topkbench.analysis.console"),
        # The command has one name: what it only shows of results, it hands on.
        "topkbench.analysis.report.samples_command",
        "topkbench.analysis.report.compare_command",
        "topkbench.analysis.export.export_command",
    ),
    "harness/run.py": ("pandas", "topkbench.analysis.comparison.stats"),
    "harness/device_use.py": ("topkbench.analysis.console",),
    "harness/launchers.py": ("topkbench.analysis.console", "joblib", "submitit", "ray"),
    "harness/plan.py": ("tabulate",),
    "harness/progress.py": ("topkbench.analysis.console",),
    "harness/runner.py": ("topkbench.analysis.console",),
    "harness/search.py": (
        *(
            "optuna",
            "sqlalchemy",
            "topkbench.analysis.console",
            "topkbench.analysis.comparison.metrics",
        ),
    ),
    "models/adapter.py": ("peft",),
    "models/gguf.py": ("gguf",),
    "analysis/tracking/tracker.py": ("wandb", "wandb_workspaces"),
    "tasks/hub.py": ("datasets",),
    "tasks/lm_eval_documents.py": ("lm_eval", "datasets"),
    "tasks/perplexity.py": ("huggingface_hub",),
    "tasks/ruler_data.py": ("nltk",),
}


# A folder of analysis imports those before it alone.
IN_ANALYSIS = ("record", "comparison", "tables", "figures", "tracking", "report", "export")

# What runs on a machine with torch, numba and Triton alone.
BARE_MACHINE = tuple(
    f"topkbench.harness.{name}"
    for name in (
        *("bench", "commit", "experiments", "gpu_check", "huge_pages", "layer", "outcome"),
        *("planted", "variants"),
    )
)


@functools.cache  # several tests ask for the same files
def imports(path: Path) -> tuple[str, ...]:
    """Return every dotted name that a file imports anywhere; ``from a import b`` gives a.b."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def code_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def is_under(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def own_code() -> list[Path]:
    return [path for folder in FOLDERS for path in code_of(folder)] + [ROOT / "run.py"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_the_table_allows(folder: str) -> None:
    not_allowed = []
    for path in code_of(folder):
        place = path.relative_to(ROOT).as_posix()
        allowed = (
            *(*ALLOWED[folder], *ALLOWED_TO_ONE.get(place, ())),
            f"topkbench.{folder}",
            *sys.stdlib_module_names,
        )
        not_allowed += [f"{place}: {name}" for name in imports(path) if not is_under(name, allowed)]
    assert not_allowed == []


@pytest.mark.parametrize("place", range(len(IN_ANALYSIS)))
def test_a_folder_of_analysis_imports_the_ones_before_it_alone(place: int) -> None:
    later = tuple(f"topkbench.analysis.{name}" for name in IN_ANALYSIS[place + 1 :])
    files = code_of(f"analysis/{IN_ANALYSIS[place]}")
    assert files != []
    assert [one for path in files for one in imports(path) if is_under(one, later)] == []


def test_analysis_has_no_other_folder_with_code() -> None:
    found = {path.relative_to(ROOT / "analysis").parts[0] for path in code_of("analysis")}
    assert found == {*IN_ANALYSIS, "colour.py", "console.py", "style.py"}


@pytest.mark.parametrize("module", BARE_MACHINE)
def test_a_bare_machine_needs_torch_kernels_and_the_contract_alone(module: str) -> None:
    allowed = (*BARE_MACHINE, "torch", "topkbench.kernels", *CONTRACT, *sys.stdlib_module_names)
    names = {
        path: ".".join(("topkbench", *path.relative_to(ROOT).with_suffix("").parts))
        for path in code_of("harness")
    }
    files = [path for path, name in names.items() if is_under(name, (module,))]
    assert files != []
    assert [one for path in files for one in imports(path) if not is_under(one, allowed)] == []


def test_implementations_of_a_kernel_do_not_import_each_other() -> None:
    found = []
    for path in code_of("kernels"):
        if path.stem in ("reference", "cpu", "fused"):
            found += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in imports(path)
                if {"reference", "cpu", "fused", "api"} & set(name.split("."))
            ]
    assert found == []


def test_an_api_imports_its_implementations_only_inside_a_branch() -> None:
    found = []
    for path in (ROOT / "kernels").glob("*/api.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            text = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
            if re.search(r"\.(cpu|fused)\b|import (cpu|fused)\b|\btriton\b|\bnumba\b", text):
                found.append(f"{path.relative_to(ROOT)}: {text}")
    assert found == []


def test_methods_and_tasks_are_not_imported_by_other_folders_nor_methods_by_each_other() -> None:
    found = []
    for path in own_code():
        place = path.relative_to(ROOT)
        if place.parts[0] == "tools":
            continue
        others = [f"topkbench.methods.{name}" for name in METHODS if name != place.stem]
        if place.parts[0] != "tasks":
            others += [f"topkbench.tasks.{name}" for name in TASKS]
        found += [f"{place}: {name}" for name in imports(path) if is_under(name, tuple(others))]
    assert found == []


@pytest.mark.parametrize("path", own_code(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_imports_a_folder_by_its_flat_name(path: Path) -> None:
    assert [name for name in imports(path) if is_under(name, (*FOLDERS, "conf"))] == []


def test_tests_import_no_folder_by_its_flat_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports(path)
        if is_under(name, FOLDERS)
    ]
    assert found == []


def words_of_code(path: Path) -> set[str]:
    """Return a file's identifiers and the words of its strings, without docstrings."""
    words: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                words |= set(re.findall(r"\w+", node.value))
        elif isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
    return words


def test_the_entry_point_names_no_method_and_no_task() -> None:
    text = ENTRY_POINT.read_text(encoding="utf-8")
    # A method whose name is a plain word would appear as a whole string.
    strings = {
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert strings & {*METHODS, *TASKS} == set()
    assert words_of_code(ENTRY_POINT) & ({*METHODS, *TASKS} - PLAIN_WORDS) == set()


def test_tasks_and_harness_name_no_selecting_method() -> None:
    distinctive = set(METHODS) - PLAIN_WORDS
    # What has no configuration says itself what it times, and what it compares with the goals.
    named = ("harness/variants.py", "harness/gpu_check/__main__.py")
    code = [path for folder in ("tasks", "harness") for path in code_of(folder)]
    code = [path for path in code if path.relative_to(ROOT).as_posix() not in named]
    found = {path.name: sorted(words_of_code(path) & distinctive) for path in code}
    assert {name: words for name, words in found.items() if words} == {}


def test_the_folders_are_namespaces() -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in (*FOLDERS, "conf", "tests")
        for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert found == []


def test_every_folder_with_code_is_packaged() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    with_code = {
        ".".join(("topkbench", *path.parent.relative_to(ROOT).parts))
        for folder in PACKAGED
        for path in code_of(folder)
    }
    packages = set(setuptools["packages"])
    assert with_code <= packages
    assert {"topkbench.conf", "topkbench.models.tiny"} <= packages
    # Every folder of packages is mapped to the import root.
    mapped = {f"topkbench.{folder}": folder for folder in (*PACKAGED, "conf")}
    assert setuptools["package-dir"] == mapped
    folders = [ROOT.joinpath(*name.split(".")[1:]) for name in packages]
    assert [folder for folder in folders if not folder.is_dir()] == []


def cell(names: tuple[str, ...]) -> str:
    """Return the modules of ``names`` as the page on the architecture writes them."""
    groups = {"the operators": KERNEL_APIS, "the contract": CONTRACT}
    words: list[str] = []
    for name in names:
        group = next((group for group, members in groups.items() if name in members), None)
        whole = group is not None and set(groups[group]) <= set(names)
        words.append(group if group and whole else f"`{name.removeprefix('topkbench.')}`")
    return ", ".join(dict.fromkeys(words))


def rows_of(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table of a page that begins with ``head``."""
    lines = page[page.index(head) :].splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[one.strip() for one in line.strip("|").split("|")] for line in lines[:end]]


def test_the_page_on_the_architecture_has_the_tables_of_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    expected = []
    for folder, names in ALLOWED.items():
        own = tuple(name for name in names if is_under(name, ("topkbench",)))
        installed = tuple(name for name in names if name not in own)
        expected.append([f"`{folder}`", cell(own), cell(installed)])
    assert rows_of(page, "| Folder | Of topkbench |") == expected
    single = [[f"`{place}`", cell(names)] for place, names in ALLOWED_TO_ONE.items()]
    assert rows_of(page, "| File | |") == single
    assert ", ".join(f"`{name.removeprefix('topkbench.')}`" for name in CONTRACT) in page
    assert f"only those before it: {cell(IN_ANALYSIS)}." in page


def test_the_page_on_the_architecture_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:kernels|methods|models|harness|tasks|analysis|tests)/[\w./]+)`", page)
    )
    named = {name for name in named if not re.search(r"NAME|OP\b", name)}
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_type_checkers_root_is_the_checkout() -> None:
    assert (ROOT / ".types" / "topkbench").resolve() == ROOT


def test_the_readme_lists_every_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Methods$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, "README.md must have a section ## Methods"
    rows: list[str] = []
    for line in section.group(1).splitlines():
        if line.startswith("|"):
            rows.append(line.split("|")[1])
        elif rows:
            break  # the first table of the section
    listed = [
        match.group(1)
        for row in rows
        if (match := re.match(r"\s*\[`(\w+)`\]\(docs/methods/\1\.md\)\s*$", row))
    ]
    assert sorted(listed) == METHODS


def test_every_yaml_file_has_its_module() -> None:
    assert [name for name in METHODS if not (ROOT / "methods" / f"{name}.py").is_file()] == []
    assert [name for name in TASKS if not (ROOT / "tasks" / f"{name}.py").is_file()] == []
