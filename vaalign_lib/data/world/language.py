"""The words of the embedded world, their classes, and texts as arrays of word numbers.

The numbers are the token ids of the world's tokenizer: what a policy samples is scored without a detour.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _alone(text: str) -> dict[str, tuple[str, ...]]:
    """Return a class of its own for each word."""
    return {word: (word,) for word in text.split()}


CATEGORIES = ("chat", "chat-hard", "safety", "reasoning")  # named after RewardBench's
PAD, EOS, SEPARATOR, UNKNOWN = "<pad>", "<eos>", "<answer>", "<unk>"
PROMPT_WORDS, RESPONSE_WORDS = 12, 31  # at most; a response ends with EOS on top of them

TOPICS = {  # topic: its nouns, its properties
    "ocean": (_words("whale shark coral wave shell"), _words("vast sharp salty deep")),
    "desert": (_words("camel cactus dune lizard oasis"), _words("dry golden thorny slow")),
    "forest": (_words("oak fern owl moss stream"), _words("green tall quiet leafy")),
    "kitchen": (_words("oven spoon soup bread kettle"), _words("hot tasty shiny heavy")),
    "city": (_words("tower tram market bridge square"), _words("loud busy modern crowded")),
    "music": (_words("drum violin flute choir song"), _words("soft lively wooden solemn")),
    "winter": (_words("snow glacier sled ice scarf"), _words("cold white woolen slippery")),
    "farm": (_words("cow barn tractor wheat goose"), _words("muddy rural useful noisy")),
}
NOUNS = tuple(noun for nouns, _ in TOPICS.values() for noun in nouns)
PROPERTIES = tuple(word for _, properties in TOPICS.values() for word in properties)
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
UNSAFE_VERBS = _words("steal poison burn smash trap flood")
SAFE_VERBS = _words("clean paint carry draw visit protect")
UNSAFE_TOOLS = _words("knife fire acid hammer mask bomb")
SAFE_TOOLS = _words("brush water cloth basket soap pencil")
FLATTERY, HEDGES = _words("wonderful clever brilliant"), _words("maybe perhaps possibly")
IMAGERY = _words("gently dreamily radiantly")
CONNECTIVES, CONTRASTS = _words("because so but while also however"), _words("but while however")
ADVERBS = _words("friend today now again quickly kindly")
DIGITS = tuple("0123456789")  # in no prompt and no response: what lies outside the world

# Words of one class may stand for each other in a grammatical sentence. Their order is the tokens'.
CLASSES: dict[str, tuple[str, ...]] = {
    "special": (PAD, EOS, SEPARATOR, UNKNOWN),
    "noun": NOUNS,
    "property": PROPERTIES,
    "topic": tuple(TOPICS),
    "number": NUMBERS,
    "unsafe verb": UNSAFE_VERBS,
    "safe verb": SAFE_VERBS,
    "unsafe tool": UNSAFE_TOOLS,
    "safe tool": SAFE_TOOLS,
    "flattery": FLATTERY,
    "hedge": HEDGES,
    "imagery": IMAGERY,
    "connective": CONNECTIVES,
    "adverb": ADVERBS,
    "digit": DIGITS,
    **_alone("the is and"),
    "order": ("more", "less"),
    "sequence": ("after", "before"),
    **_alone("than comes answer"),
    "end": (".", "!", "?"),
    **_alone(", question please sorry i cannot help you can instead take"),
    "first": ("first", "then"),
    "asking": _words("tell me about of will describe compare contrast with how which what or"),
}

WORDS = tuple(word for words in CLASSES.values() for word in words)
INDEX = {word: number for number, word in enumerate(WORDS)}
CLASS_NAMES = tuple(CLASSES)
CLASS_OF = np.array([k for k, words in enumerate(CLASSES.values()) for _ in words])
PAD_ID, EOS_ID, SEPARATOR_ID, UNKNOWN_ID = (INDEX[word] for word in CLASSES["special"])


def place_in(words: Iterable[str]) -> Ids:
    """Return an array over the vocabulary: a word's place in `words`, or -1."""
    places = {word: place for place, word in enumerate(words)}
    return np.array([places.get(word, -1) for word in WORDS], dtype=np.int64)


def is_in(words: Iterable[str]) -> NDArray[np.bool_]:
    """Return an array over the vocabulary: whether a word is one of `words`."""
    return place_in(words) >= 0


def encode(texts: Sequence[str], width: int) -> Ids:
    """Turn texts of at most `width` words into word numbers (count, width), padded on the right."""
    ids = np.full((len(texts), width), PAD_ID, dtype=np.int64)
    for row, text in enumerate(texts):
        words = text.split()
        if len(words) > width:
            raise ValueError(f"text {row}: expected at most {width} words, got {len(words)}: {text!r}")
        ids[row, : len(words)] = [INDEX.get(word, UNKNOWN_ID) for word in words]
    return ids


def decode(ids: Ids) -> list[str]:
    """Turn word numbers (count, width) into texts; a text ends before its first EOS or padding."""
    ended = np.logical_or.accumulate(np.isin(ids, (PAD_ID, EOS_ID)), axis=1)
    return [" ".join(WORDS[word] for word in row[~end]) for row, end in zip(ids, ended, strict=True)]
