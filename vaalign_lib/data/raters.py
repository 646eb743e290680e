"""Texts that several people have rated, as tidy tables.

Columns: `text`, `domain`, `ratings` (an array of a number each), and of these `people` (how many), `mean` and
`variance` (of a single rating, ddof=1).
"""

import io
import json
import math
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash
from numpy.typing import NDArray

from vaalign_lib.data.pairs import DataError
from vaalign_lib.statistics.arrays import count
from vaalign_lib.store import write_atomically

LEXICON = "vaderSentiment/vader_lexicon.txt"
TEXTS = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "tweets": "tweets",
    "movieReviewSnippets": "films",
    "amazonReviewSnippets": "products",
    "nytEditorialSnippets": "editorials",
}
OPENING, LEAST_WORDS = 6, 12  # words of a text that a prompt quotes, and that it must have
HELD_OUT = 5  # one text of so many


def rated(rows: Iterable[tuple[str, str, list[float]]]) -> pd.DataFrame:
    """Return the table of texts, their domains, and what people rated them."""
    table = pd.DataFrame(rows, columns=["text", "domain", "ratings"])
    table["ratings"] = [np.asarray(one, dtype=float) for one in table["ratings"]]
    table["people"] = [len(one) for one in table["ratings"]]
    table["mean"] = [one.mean() for one in table["ratings"]]
    table["variance"] = [one.var(ddof=1) for one in table["ratings"]]
    return table


# --- anybody's ------------------------------------------------------------------------------------------


def read_raters(source: str | Path) -> pd.DataFrame:
    """Read a file of lines {"text": ..., "ratings": [...]}, with "domain" if you like, else its name is.

    Raises:
        DataError: the file or a line is not as expected.
    """
    path = Path(source)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() knows ten other ends
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8: {error}") from None
    rows = [_row(f"{path}:{k}", line, path.stem) for k, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f'{path}: expected lines of {{"text": ..., "ratings": [...]}}, found none')
    return rated(rows)


def write_raters(path: Path, table: pd.DataFrame) -> None:
    """Write a table as `read_raters` reads it."""
    rows = zip(table["text"], table["domain"], table["ratings"], strict=True)
    lines = [json.dumps({"text": t, "domain": d, "ratings": r.tolist()}) for t, d, r in rows]
    write_atomically(path, "\n".join(lines) + "\n")


def _row(place: str, line: str, domain: str) -> tuple[str, str, list[float]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f'{place}: expected {{"text": ..., "ratings": [...]}}, got {record!r:.80}')
    text, named = record.get("text"), record.get("domain", domain)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: text: expected one with words, got {text!r:.80}")
    if not isinstance(named, str) or not named.strip():
        raise DataError(f"{place}: domain: expected a name, got {named!r:.80}")
    return text, named, _ratings(place, record.get("ratings"))


def _ratings(place: str, value: Any) -> list[float]:
    listed = value if isinstance(value, list) else []
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in listed)
    if len(listed) < 2 or not numbers or not all(map(math.isfinite, listed)):
        raise DataError(f"{place}: ratings: expected a list of at least two numbers, got {value!r:.80}")
    return [float(one) for one in listed]


# --- those of the package -------------------------------------------------------------------------------


def read_words(archive: Path) -> pd.DataFrame:
    """Read the words of VADER's source distribution, in lower case as there, each with ten people's ratings
    from -4 to 4; a word that stands there twice has those of twenty.
    """
    people: dict[str, list[float]] = {}
    for place, (word, _, _, ratings) in _lines(_member(archive, LEXICON), LEXICON, 4):
        people.setdefault(word, []).extend(_listed(place, ratings))
    return rated((word, "words", ratings) for word, ratings in people.items())


def read_texts(archive: Path) -> pd.DataFrame:
    """Read the texts of VADER's source distribution with the ratings of 14 people and more, from -4 to 4.

    What counts are the ratings: the means that are printed beside the texts are those of the ratings but for
    199 tweets. A text that stands there twice is two rows, rated by others.
    """
    inner = _member(archive, TEXTS)
    rows = []
    for name, domain in DOMAINS.items():
        texts, ratings = f"{name}_GroundTruth.txt", f"{name}_anonDataRatings.txt"
        said = {key: text for _, (key, _, text) in _lines(_member(inner, texts), texts, 3)}
        for place, (key, _, _, people) in _lines(_member(inner, ratings), ratings, 4):
            if key not in said:
                raise DataError(f"{place}: {key} is no text of {texts}")
            rows.append((said.pop(key), domain, _listed(place, people)))
        if said:
            raise DataError(f"{texts}: nobody has rated {min(said)}")
    return rated(rows)


def _member(archive: Path | bytes, name: str) -> bytes:
    """Return a file of a packed archive by the end of its path."""
    content = io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
    with content, tarfile.open(fileobj=content, mode="r:gz") as packed:
        for one in packed:
            if one.isfile() and f"/{one.name}".endswith(f"/{name}"):
                return packed.extractfile(one).read()  # type: ignore[union-attr]
    raise DataError(f"{archive if isinstance(archive, Path) else TEXTS}: holds no {name}")


def _lines(content: bytes, name: str, fields: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the tab-separated fields of every line."""
    text = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    for k, line in enumerate(text.split("\n"), 1):
        found = line.split("\t")
        if len(found) != fields:
            raise DataError(f"{name}:{k}: expected {fields} fields between tabs, got {len(found)}")
        yield f"{name}:{k}", found


def _listed(place: str, text: str) -> list[float]:
    try:
        return _ratings(place, json.loads(text))
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{place}: ratings: {error}") from None


def prompts_of_texts(texts: pd.DataFrame) -> pd.DataFrame:
    """Return `prompt` and `subset`, the domain: to go on from the opening words of long enough texts that are
    held out, of all domains mixed.
    """
    what = {"tweets": "message", "films": "film review", "products": "product review"}
    rows, asked = [], texts[held_out(texts["text"])]
    asked = asked.iloc[np.argsort([_hash(text) for text in asked["text"]], kind="stable")]
    for text, domain in zip(asked["text"], asked["domain"], strict=True):
        if len(words := text.split()) >= LEAST_WORDS:
            begun = " ".join(words[:OPENING])
            rows.append((f"Finish this {what.get(domain, 'article')} in one sentence: {begun}", domain))
    return pd.DataFrame(rows, columns=["prompt", "subset"]).drop_duplicates("prompt", ignore_index=True)


# --- texts and people who are held out ------------------------------------------------------------------


def held_out(texts: Iterable[str]) -> NDArray[np.bool_]:
    """Return which texts no reward model learns from (texts,): one in five, by the text alone."""
    return np.array([_hash(text) % HELD_OUT == 0 for text in texts], dtype=bool)


def _hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode(errors="surrogatepass"))


def split_raters(table: pd.DataFrame, held_out: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return two tables of the same texts: without, and of, so many people for each, chosen at random.

    Whom a text's are depends on the seed, the text and its number of ratings only. Two people at least must
    be on either side, for a variance.
    """
    count("held_out", held_out, 2)
    if len(short := table[table["people"] < held_out + 2]):
        row = short.iloc[0]
        raise DataError(f"held_out: {held_out} of {row['people']} leave fewer than two: {row['text']!r:.60}")
    sides: tuple[list[Any], list[Any]] = [], []
    for text, domain, ratings in zip(table["text"], table["domain"], table["ratings"], strict=True):
        order = np.random.default_rng([seed, _hash(text)]).permutation(len(ratings))
        for side, people in zip(sides, (order[held_out:], order[:held_out]), strict=True):
            side.append((text, domain, ratings[np.sort(people)]))
    return rated(sides[0]), rated(sides[1])
