"""What rows need beside text: models, tokenizers, archives, servers.

A plain function writes files into the folder it is given; it runs once, and every row that names it gets
a copy. A generator function runs for each row, yields once (the row has what it yields as `prepared`),
and goes on when the row is over.
"""

import gzip
import json
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import yaml

from tests.bad_input.policy_parts import policies as policies  # a generator function, see there
from tests.bad_input.policy_parts import policy_folders as policy_folders
from tests.bad_input.reward_parts import rewards as rewards  # likewise
from tests.bad_input.store_parts import results as results
from tests.bad_input.store_parts import silent_server as silent_server
from vaalign_lib.store import PROFILES

# --- profiles -----------------------------------------------------------------------------------------


def smoke_without(folder: Path, *place: str) -> None:
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text()) | {"name": "mine"}
    *sections, key = place
    section = content
    for name in sections:
        section = section[name]
    del section[key]
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))


def without_mistral(folder: Path) -> None:
    smoke_without(folder, "policies", "training", "mistral")


def without_model(folder: Path) -> None:
    smoke_without(folder, "reference", "models", "gpt2")


def without_true_reward(folder: Path) -> None:
    smoke_without(folder, "true_reward")


def long_name(folder: Path) -> None:
    text = f"extends: smoke\nname: mine\nreference: {{models: {{gpt2: {'a' * 5000}}}}}\n"
    (folder / "mine.yaml").write_text(text)


def large_profile(folder: Path) -> None:
    (folder / "mine.yaml").write_text("extends: smoke\nname: mine\n" + "# much\n" * 500_000)


def deep_profile(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: " + "[" * 1_000)


# --- data ---------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(content)
    return bytes(stream.getvalue().to_pybytes())


def data_files(folder: Path) -> None:
    """Write files of pairs that text in a row cannot make: deep, packed, cut, of other encodings."""
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    line = json.dumps(pair).encode() + b"\n"
    much = b" " * 2**27
    files = {
        "keys.jsonl": json.dumps({f"key {k}": k for k in range(10_000)}).encode(),
        "deep.jsonl": b'{"prompt": ' + b"[" * 100_000,
        "deep_list.json": b"[" * 100_000,
        "digits.jsonl": b'{"prompt": ' + b"1" * 5000 + b"}",
        "utf16.jsonl": line.decode().encode("utf-16"),
        "latin.csv": "prompt,chosen,rejected\np,\u00e9,b\n".encode("latin-1"),
        "twice.jsonl.gz": gzip.compress(gzip.compress(line)),
        "cut.jsonl.gz": gzip.compress(line * 100)[:-20],
        "cut.jsonl.zst": zstd(line * 100)[:-5],
        "flipped.jsonl.gz": gzip.compress(line)[:-8] + bytes(8),
        "magic.jsonl.gz": b"\x1f\x8b",
        "magic.jsonl.zst": b"\x28\xb5\x2f\xfd",
        "bomb.jsonl.gz": gzip.compress(much, 1),
        "bomb.jsonl.zst": zstd(much),
        "text.parquet": line,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "zip.jsonl", "w") as archive:
        archive.writestr("pairs.jsonl", line)
    tables = {
        "bomb": [pair | {"chosen": "a" * 2**20}] * 100,
        "numbers": [pair | {"chosen": 3}],
        "dates": [pair | {"chosen": pd.Timestamp("2020-01-01")}],
        "missing": [pair | {"chosen": None}],
    }
    for name, rows in tables.items():
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    pd.DataFrame(tables["bomb"][:0]).to_parquet(folder / "empty.parquet")
    twice = pa.table([["p"], ["a"], ["b"], ["c"]], ["prompt", "chosen", "rejected", "rejected"])
    pa.parquet.write_table(twice, folder / "twice.parquet")
    whole = (folder / "numbers.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.jsonl").mkdir()


def link_loop(folder):
    """A link to itself, a generator for links are not copied."""
    (folder / "loop").symlink_to(folder / "loop")
    yield
