"""The version ranges of pyproject.toml agree with the versions in constraints.txt."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from topkbench.analysis.record.provenance import pinned_versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [Requirement(one) for one in PROJECT["dependencies"]]


@pytest.mark.parametrize("requirement", RANGES, ids=lambda one: one.name)
def test_a_version_range_ends_just_above_the_tested_version(requirement: Requirement) -> None:
    tested = pinned_versions()[requirement.name]
    assert requirement.specifier.contains(tested)
    (end,) = [one.version for one in requirement.specifier if one.operator == "<"]
    major, minor = (int(part) for part in [*tested.split("."), "0"][:2])
    found = [int(part) for part in end.split(".")]
    assert found in ([major + 1], [major, minor + 1])


def test_every_package_of_the_tests_is_pinned() -> None:
    pins = pinned_versions()
    for requirement in map(
        Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    ):
        assert requirement.name in pins
        assert version(requirement.name)


def test_every_package_of_the_site_is_pinned_within_its_range() -> None:
    pins = pinned_versions()
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["docs"]):
        assert requirement.specifier.contains(pins[requirement.name])
        assert any(one.operator in ("<", "==") for one in requirement.specifier)


def test_the_readme_installs_the_tested_versions() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pip install -e . -c constraints.txt && python run.py method=hata k=512 -m" in readme
    assert 'pip install -e ".[dev]" -c constraints.txt && pytest' in readme
    start = (ROOT / "docs" / "index.md").read_text()
    assert "pip install -e . -c constraints.txt && python run.py method=hata k=512 -m" in start
    assert 'pip install -e ".[dev]" -c constraints.txt && pytest' in start
    assert 'pip install --quiet -e ".[dev]" -c constraints.txt' in (ROOT / ".ci/run").read_text()
