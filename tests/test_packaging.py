"""pyproject.toml, the lock and environment.yml say the same."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vaalign_lib.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def test_every_requirement_is_pinned_inside_its_range():
    locked = pins()
    for requirement in requirements():
        version = locked[canonical(requirement.name)]
        assert version in requirement.specifier, f"{requirement} against the lock's {version}"


def test_the_lock_names_no_build_of_torch():
    assert "+" not in (ROOT / "requirements.lock").read_text()
    assert not any(name.startswith("nvidia") for name in pins())


def test_the_running_environment_is_the_locked_one():
    from importlib.metadata import version

    for name in ("numpy", "scipy", "pandas", "matplotlib", "papermill", "torch", "transformers"):
        assert version(name).split("+")[0] == pins()[name]


def test_conda_environment_uses_the_same_lock_and_python():
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(entry for entry in content["dependencies"] if str(entry).startswith("python"))
    assert content["channels"] == ["conda-forge"]
    assert content["dependencies"][-1] == {"pip": ["-r requirements.lock", "-e ."]}
    allowed, wanted = (
        SpecifierSet(PROJECT["requires-python"]),
        SpecifierSet(python.removeprefix("python")),
    )
    for version in ("3.10", "3.11", "3.12", "3.13"):
        assert (version in wanted) <= (version in allowed)
    assert "3.11" in wanted and "3.10" not in wanted
