"""People's ratings: of the package's layout, of anybody's file, and split by person."""

import io
import json
import tarfile

import numpy as np
import pandas as pd
import pytest

from vaalign_lib.data.pairs import DataError
from vaalign_lib.data.raters import (
    DOMAINS,
    held_out,
    prompts_of_texts,
    rated,
    read_raters,
    read_texts,
    read_words,
    split_raters,
    write_raters,
)


def packed(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def package(tmp_path, lexicon="", **changes):
    """Write a source distribution of the package's layout: line ends, byte order marks, order of lines."""
    inner = {}
    for name in DOMAINS:
        inner[f"d/{name}_GroundTruth.txt"] = f"1_1\t0.5\tGood \u0085 of {name}\r\n1_2\t-1\tBad".encode()
        ratings = "\ufeff1_2\t-1\t0.5\t[-1, 0, -2]\r\n1_1\t0.5\t0.5\t[0, 1, 0, 1]\r\n"
        inner[f"d/{name}_anonDataRatings.txt"] = ratings.encode()
    inner |= {f"d/{name}.txt": text.encode() for name, text in changes.items()}
    lexicon = lexicon or "good\t1.9\t0.9\t[2, 1, 1, 3]\r\n:)\t2\t1\t[2, 2]\r\ngood\t1\t0\t[1, 1]"
    outer = {"v/vaderSentiment/vader_lexicon.txt": lexicon.encode()}
    outer["v/additional_resources/hutto_ICWSM_2014.tar.gz"] = packed(inner)
    path = tmp_path / "package.tar.gz"
    path.write_bytes(packed(outer))
    return path


def test_texts_of_the_package_meet_their_ratings_by_key(tmp_path):
    texts = read_texts(package(tmp_path))
    assert texts["domain"].tolist() == [one for one in DOMAINS.values() for _ in range(2)]
    first = texts[texts["domain"] == "films"].set_index("text")
    good = first.loc["Good \u0085 of movieReviewSnippets"]
    assert good["ratings"].tolist() == [0, 1, 0, 1] and good["people"] == 4
    assert first.loc["Bad", ["mean", "variance"]].tolist() == [-1, 1]


def test_a_word_that_stands_twice_has_the_ratings_of_both(tmp_path):
    words = read_words(package(tmp_path)).set_index("text")
    assert words.index.tolist() == ["good", ":)"]
    assert words.loc["good", "ratings"].tolist() == [2, 1, 1, 3, 1, 1]


def test_mean_and_variance_are_unbiased():
    random = np.random.default_rng(0)
    ratings = random.integers(-4, 5, (4000, 3)).astype(float)  # variance 60/9
    table = rated(("text", "some", row.tolist()) for row in ratings)
    np.testing.assert_allclose(table["mean"], ratings.mean(1))
    np.testing.assert_allclose(table["variance"], ratings.var(1, ddof=1))
    error = table["variance"].std() / np.sqrt(len(table))
    assert abs(table["variance"].mean() - 60 / 9) < 4 * error


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lexicon": "good\t1.9\t[2, 1]"}, "vader_lexicon.txt:1: expected 4 fields between tabs, got 3"),
        ({"lexicon": "a\t1\t1\t[1, 2]\nb\t1\t1\t[1, x]"}, "vader_lexicon.txt:2: ratings: "),
        ({"lexicon": "a\t1\t1\t[1]"}, "vader_lexicon.txt:1: ratings: expected a list of at least two"),
        ({"tweets_GroundTruth": "1_1\t0\ta\n1_2\t0\tb\n1_3\t0\tc"}, "nobody has rated 1_3"),
        ({"tweets_GroundTruth": "1_1\t0\ta"}, "tweets_anonDataRatings.txt:1: 1_2 is no text of"),
    ],
)
def test_another_layout_is_refused_with_its_line(tmp_path, changes, told):
    path = package(tmp_path, **changes)
    with pytest.raises(DataError) as error:
        read_words(path) if "lexicon" in changes else read_texts(path)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_archive_without_the_files_is_refused(tmp_path):
    path = tmp_path / "other.tar.gz"
    path.write_bytes(packed({"v/readme": b""}))
    with pytest.raises(DataError, match=r"other.tar.gz: holds no vaderSentiment/vader_lexicon.txt"):
        read_words(path)


def test_what_was_written_is_read(tmp_path):
    table = rated([("one \u2028 text", "films", [1, 2.5]), ("'", "tweets", [0, 0, -4])])
    write_raters(tmp_path / "texts.jsonl", table)
    pd.testing.assert_frame_equal(read_raters(tmp_path / "texts.jsonl"), table)


def test_anybodys_file_needs_texts_and_ratings_only(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('\ufeff{"text": "a \u2028 b", "ratings": [1, 3]}\r\n\n{"text": "c", "ratings": [0, 0.5]}')
    table = read_raters(path)
    assert table["domain"].tolist() == ["mine", "mine"] and table["text"][0] == "a \u2028 b"
    assert table["variance"].tolist() == [2, 0.125]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not valid JSON"),
        ("[1]", 'expected {"text": ..., "ratings": [...]}, got [1]'),
        ({"ratings": [1, 2]}, "text: expected one with words, got None"),
        ({"text": " ", "ratings": [1, 2]}, "text: expected one with words, got ' '"),
        ({"text": "a"}, "ratings: expected a list of at least two numbers, got None"),
        ({"text": "a", "ratings": [1]}, "ratings: expected a list of at least two numbers, got [1]"),
        ({"text": "a", "ratings": [1, "2"]}, "ratings: expected a list of at least two numbers"),
        ({"text": "a", "ratings": [1, True]}, "ratings: expected a list of at least two numbers"),
        ({"text": "a", "ratings": [1, float("nan")]}, "ratings: expected a list of at least two numbers"),
        ({"text": "a", "ratings": [1, 2], "domain": 3}, "domain: expected a name, got 3"),
    ],
)
def test_a_wrong_line_is_told_with_file_and_number(tmp_path, line, told):
    path = tmp_path / "mine.jsonl"
    good = json.dumps({"text": "a", "ratings": [1, 2]})
    path.write_text(f"{good}\n\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(DataError) as error:
        read_raters(path)
    assert f"mine.jsonl:3: {told}" in str(error.value)


def test_files_that_are_none_are_told(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, told in (("empty", "found none"), ("bytes", "cannot be read"), ("absent", "cannot be read")):
        with pytest.raises(DataError, match=f"{name}.jsonl: .*{told}"):
            read_raters(tmp_path / f"{name}.jsonl")


def test_people_are_held_out_at_random_and_the_same_for_the_same_seed():
    table = rated((f"text {k}", "some", [10 * k + j for j in range(10)]) for k in range(200))
    kept, held = split_raters(table, 4, seed=3)
    for whole, one, other in zip(table["ratings"], kept["ratings"], held["ratings"], strict=True):
        assert (len(one), len(other)) == (6, 4) and sorted([*one, *other]) == whole.tolist()
    again, _ = split_raters(table[150:], 4, seed=3)  # whatever texts there are beside
    assert [one.tolist() for one in again["ratings"]] == [one.tolist() for one in kept["ratings"][150:]]
    other, _ = split_raters(table, 4, seed=4)
    assert sum(a.tolist() == b.tolist() for a, b in zip(other["ratings"], kept["ratings"], strict=True)) < 20
    chosen = np.bincount(np.concatenate(held["ratings"]).astype(int) % 10, minlength=10)
    assert np.abs(chosen - 80).max() < 4 * np.sqrt(200 * 0.4 * 0.6)


def test_too_few_people_to_hold_out_are_told():
    table = rated([("a", "some", [1, 2, 3, 4]), ("short", "some", [1, 2, 3])])
    with pytest.raises(DataError, match="held_out: 2 of 3 leave fewer than two: 'short'"):
        split_raters(table, 2, seed=0)
    with pytest.raises(ValueError, match="held_out"):
        split_raters(table, 1, seed=0)


def test_prompts_quote_the_opening_of_long_enough_texts_that_are_held_out():
    long = [f"{k} b c d e f g h i j k l" for k in range(200)]
    rows = [(text, ["films", "odd"][k % 2], [1, 2]) for k, text in enumerate(long)]
    rows += [(f"{text} m", domain, ratings) for text, domain, ratings in rows]
    table = rated([*rows, ("too short", "films", [1, 2])])
    prompts = prompts_of_texts(table)
    asked = table["text"][held_out(table["text"])]
    quoted = {" ".join(text.split()[:6]) for text in asked if len(text) > 9}
    what = {"films": "film review", "odd": "article"}
    begun = [
        p.removeprefix(f"Finish this {what[d]} in one sentence: ") for p, d in prompts.itertuples(index=False)
    ]
    assert set(begun) == quoted and 20 < held_out(long).sum() < 60
    assert 5 < (prompts["subset"][:20] == "films").sum() < 20  # mixed
