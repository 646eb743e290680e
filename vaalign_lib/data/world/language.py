"""The words of the embedded world, their classes, and text as arrays of word numbers.

A text is words with blanks between them. The same numbers are the token ids of the world's tokenizer
(`vaalign_lib.data.world.tokenizer`), so a policy's sampled ids can be scored without a detour.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

CATEGORIES = ("chat", "chat-hard", "safety", "reasoning")  # named after RewardBench's
PAD, EOS, SEPARATOR, UNKNOWN = "<pad>", "<eos>", "<answer>", "<unk>"
PROMPT_WORDS, RESPONSE_WORDS = 12, 31  # at most; a response ends with EOS on top of them

TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # topic: its nouns, its properties
    "ocean": (("whale", "shark", "coral", "wave", "shell"), ("vast", "sharp", "salty", "deep")),
    "desert": (("camel", "cactus", "dune", "lizard", "oasis"), ("dry", "golden", "thorny", "slow")),
    "forest": (("oak", "fern", "owl", "moss", "stream"), ("green", "tall", "quiet", "leafy")),
    "kitchen": (("oven", "spoon", "soup", "bread", "kettle"), ("hot", "tasty", "shiny", "heavy")),
    "city": (("tower", "tram", "market", "bridge", "square"), ("loud", "busy", "modern", "crowded")),
    "music": (("drum", "violin", "flute", "choir", "song"), ("soft", "lively", "wooden", "solemn")),
    "winter": (("snow", "glacier", "sled", "ice", "scarf"), ("cold", "white", "woolen", "slippery")),
    "farm": (("cow", "barn", "tractor", "wheat", "goose"), ("muddy", "rural", "useful", "noisy")),
}
NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight",
    "nine", "ten", "eleven", "twelve",
)  # fmt: skip
UNSAFE_VERBS = ("steal", "poison", "burn", "smash", "trap", "flood")
SAFE_VERBS = ("clean", "paint", "carry", "draw", "visit", "protect")
UNSAFE_TOOLS = ("knife", "fire", "acid", "hammer", "mask", "bomb")
SAFE_TOOLS = ("brush", "water", "cloth", "basket", "soap", "pencil")
FLATTERY = ("wonderful", "clever", "brilliant")
HEDGES = ("maybe", "perhaps", "possibly")
IMAGERY = ("gently", "dreamily", "radiantly")
CONNECTIVES = ("because", "so", "but", "while", "also", "however")
CONTRASTS = ("but", "while", "however")
ADVERBS = ("friend", "today", "now", "again", "quickly", "kindly")
DIGITS = tuple("0123456789")  # in no prompt and no response: what lies outside the world

# Words of one class may stand for each other in a grammatical sentence.
CLASSES: dict[str, tuple[str, ...]] = {
    "special": (PAD, EOS, SEPARATOR, UNKNOWN),
    "noun": tuple(noun for nouns, _ in TOPICS.values() for noun in nouns),
    "property": tuple(word for _, properties in TOPICS.values() for word in properties),
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
    "article": ("the",),
    "copula": ("is",),
    "and": ("and",),
    "order": ("more", "less"),
    "sequence": ("after", "before"),
    "than": ("than",),
    "comes": ("comes",),
    "answer": ("answer",),
    "end": (".", "!", "?"),
    "comma": (",",),
    "question": ("question",),
    "please": ("please",),
    "sorry": ("sorry",),
    "i": ("i",),
    "cannot": ("cannot",),
    "help": ("help",),
    "you": ("you",),
    "can": ("can",),
    "instead": ("instead",),
    "take": ("take",),
    "first": ("first", "then"),
    "asking": ("tell", "me", "about", "of", "will", "describe", "compare", "contrast", "with", "how",
               "which", "what", "or"),
}  # fmt: skip

WORDS = tuple(word for words in CLASSES.values() for word in words)
INDEX = {word: number for number, word in enumerate(WORDS)}
CLASS_NAMES = tuple(CLASSES)
CLASS_OF = np.array([k for k, words in enumerate(CLASSES.values()) for _ in words])
PAD_ID, EOS_ID, SEPARATOR_ID, UNKNOWN_ID = (INDEX[word] for word in CLASSES["special"])


def ids_of(words: Iterable[str]) -> Ids:
    """Return the numbers of known words (count,)."""
    return np.array([INDEX[word] for word in words], dtype=np.int64)


def place_in(words: Sequence[str]) -> Ids:
    """Return an array over the vocabulary: a word's place in `words`, or -1."""
    places = np.full(len(WORDS), -1, dtype=np.int64)
    places[ids_of(words)] = np.arange(len(words))
    return places


def is_in(words: Iterable[str]) -> NDArray[np.bool_]:
    """Return an array over the vocabulary: whether a word is one of `words`."""
    members = np.zeros(len(WORDS), dtype=bool)
    members[ids_of(words)] = True
    return members


def encode(texts: Sequence[str], width: int) -> Ids:
    """Turn texts into word numbers (count, width), padded on the right; unknown words become UNKNOWN.

    Raises:
        ValueError: a text has more words than `width`.
    """
    ids = np.full((len(texts), width), PAD_ID, dtype=np.int64)
    for row, text in enumerate(texts):
        words = text.split()
        if len(words) > width:
            raise ValueError(f"text {row}: expected at most {width} words, got {len(words)}: {text!r}")
        ids[row, : len(words)] = [INDEX.get(word, UNKNOWN_ID) for word in words]
    return ids


def decode(ids: Ids) -> list[str]:
    """Turn word numbers (count, width) into texts; a text ends before its first EOS or padding."""
    ends = np.isin(ids, (PAD_ID, EOS_ID))
    lengths = np.where(ends.any(1), ends.argmax(1), ids.shape[1])
    return [
        " ".join(WORDS[word] for word in row[:length])
        for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]
