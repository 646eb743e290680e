"""Packages are fetched once, by their hash, and made into ordinary folders once."""

import hashlib
import os
import zipfile
from dataclasses import replace

import pytest

from vaalign_lib.data import packages
from vaalign_lib.data.packages import GGUF, PackageError, fetched
from vaalign_lib.data.raters import read_raters
from vaalign_lib.reproduce import pretrained


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in place of the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [one for one in os.environ if one.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def pinned(content):
    """A package whose file has this content."""
    return replace(GGUF, digest=hashlib.sha256(content).hexdigest(), size=len(content))


def wheel(path):
    """Write a wheel that pip takes for the package's, and return its content."""
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("gguf/__init__.py", "")
        about = "gguf-0.19.0.dist-info"
        packed.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: gguf\nVersion: 0.19.0\n")
        packed.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{about}/RECORD", "")
    return path.read_bytes()


def test_a_package_is_fetched_once_and_again_where_its_file_is_broken(index, tmp_path, monkeypatch):
    content = wheel(index / GGUF.file)
    package, cache = pinned(content), tmp_path / "cache"
    path = fetched(package, cache)
    assert path.read_bytes() == content and [*cache.iterdir()] == [path]
    path.write_bytes(content[:100])  # as a full disk leaves it
    assert fetched(package, cache).read_bytes() == content
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("fetched twice"))
    assert fetched(package, cache) == path


def test_another_file_is_refused_in_one_line_and_not_kept(index, tmp_path):
    wheel(index / GGUF.file)
    with pytest.raises(
        PackageError, match=r"gguf-0.19.0-py3-none-any.whl: its SHA-256 is .*try again"
    ) as told:
        fetched(GGUF, tmp_path / "cache")
    assert "\n" not in str(told.value) and not [*(tmp_path / "cache").iterdir()]


def test_what_the_index_has_not_is_told_in_one_line(index, tmp_path):
    with pytest.raises(PackageError, match=r"gguf 0\.19\.0: pip could not fetch it: ") as told:
        fetched(GGUF, tmp_path / "cache")
    assert "\n" not in str(told.value)


def test_a_folder_is_made_anew_only_where_it_is_damaged_or_of_other_packages(index, tmp_path):
    package, home = pinned(wheel(index / GGUF.file)), tmp_path / "home"
    written = []

    def write(folder, file):
        written.append(file)
        (folder / "text").write_text("1")

    one = pretrained.Folder("some", (package,), write)
    folder = pretrained.made(one, home)
    assert pretrained.made(one, home) == folder and len(written) == 1
    (folder / "text").write_text("2")
    assert (pretrained.made(one, home) / "text").read_text() == "1" and len(written) == 2
    other = wheel(index / GGUF.file) + b"\0"
    (index / GGUF.file).write_bytes(other)
    one = pretrained.Folder("some", (pinned(other),), write)
    pretrained.made(one, home)
    assert len(written) == 3


def test_what_fails_is_one_line_of_the_command(monkeypatch, capsys):
    def fetch(*_):
        raise PackageError("not to be had")

    monkeypatch.setattr(pretrained, "made", fetch)
    assert pretrained.main() == 2
    assert capsys.readouterr().err == "make pretrained: not to be had\n"


def test_people_rated_the_texts_of_the_package():
    """The real ones, a download of 2.5 MB the first time."""
    try:
        folder = pretrained.made(pretrained.FOLDERS[2])
    except PackageError as error:
        pytest.skip(f"no package index: {error}")
    words, texts = read_raters(folder / "words.jsonl"), read_raters(folder / "texts.jsonl")
    assert len(words) == 7506 and set(words["people"]) == {10, 20}
    assert words.set_index("text").loc["okay", "mean"] == 0.9
    counts = texts["domain"].value_counts().to_dict()
    assert counts == {"films": 10605, "editorials": 5190, "tweets": 4200, "products": 3708}
    assert texts["people"].between(14, 100).all()
    assert words["mean"].abs().max() <= 4 and texts["mean"].abs().max() <= 4
