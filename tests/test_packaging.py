"""pyproject.toml, the lock and environment.yml say the same."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vaalign_lib.store import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> list[tuple[Requirement, list[str]]]:
    """Return the requirements of the lock with the hashes of their files."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    lines = [line.split("--hash=") for line in text.splitlines()]
    return [(Requirement(first), [one.strip() for one in hashes]) for first, *hashes in lines]


def pins() -> dict[str, str]:
    environment = {"python_version": "3.11", "python_full_version": "3.11.7"}
    names = {
        canonical(one.name): str(one.specifier).removeprefix("==")
        for one, _ in locked()
        if one.marker is None or one.marker.evaluate(environment)
    }
    (torch,) = re.findall(r"^TORCH := ([\d.]+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    return names | {"torch": torch}


def requirements() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def test_every_requirement_is_pinned_inside_its_range():
    locked = pins()
    for requirement in requirements():
        version = locked[canonical(requirement.name)]
        assert version in requirement.specifier, f"{requirement} against the lock's {version}"


def test_the_lock_leaves_the_build_of_torch_to_the_index():
    names = {canonical(one.name) for one, _ in locked()}
    assert "torch" not in names and not any(one.startswith(("nvidia", "triton")) for one in names)


def test_every_file_of_the_lock_has_a_hash_and_one_version():
    for one, hashes in locked():
        assert re.fullmatch(r"==[\w.]+", str(one.specifier)), one
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), one
    files = {canonical(one.name): len(hashes) for one, hashes in locked()}
    assert files["numpy"] > 20 and files["pyarrow"] > 20  # those of other platforms, too
    assert {"appnope", "colorama", "pywinpty", "setuptools"} <= set(files)


def test_the_running_environment_is_the_locked_one():
    from importlib.metadata import version

    for name in ("numpy", "scipy", "pandas", "matplotlib", "papermill", "torch", "transformers"):
        assert version(name).split("+")[0] == pins()[name]


def test_conda_environment_uses_the_same_lock_and_python():
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(entry for entry in content["dependencies"] if str(entry).startswith("python"))
    assert content["channels"] == ["conda-forge"]
    assert {"pip", "make"} <= set(content["dependencies"])  # what `make install` needs
    allowed, wanted = (SpecifierSet(PROJECT["requires-python"]), SpecifierSet(python.removeprefix("python")))
    for version in ("3.10", "3.11", "3.12", "3.13"):
        assert (version in wanted) <= (version in allowed)
    assert "3.11" in wanted and "3.10" not in wanted
