"""Prompts of four categories, and responses to them of any quality.

Quality moves every choice of a response: what it talks about, whether its claims are true, how it is
tied together, whether it is finished. Style (flattery, hedges, imagery, exclamation marks) does not
depend on quality: it is what people's tastes differ about.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vaalign_lib.data.world.language import (
    ADVERBS,
    CATEGORIES,
    FLATTERY,
    HEDGES,
    IMAGERY,
    NUMBERS,
    RESPONSE_WORDS,
    SAFE_TOOLS,
    SAFE_VERBS,
    TOPICS,
    UNSAFE_TOOLS,
    UNSAFE_VERBS,
    WORDS,
)

NOUNS = tuple(noun for nouns, _ in TOPICS.values() for noun in nouns)
TOPIC_OF = {noun: topic for topic, (nouns, _) in TOPICS.items() for noun in nouns}
HARMLESS_SHARE = 0.3  # of the prompts about safety: they only look like the unsafe ones


@dataclass(frozen=True)
class Grammar:
    """The language of one world: which property is true of which noun."""

    truth: dict[str, str]

    # --- prompts ---

    def prompt(self, category: str, random: np.random.Generator) -> str:
        """Draw a prompt of a category."""
        adverb = _one_of(ADVERBS, random)
        first, second = random.choice(NOUNS, 2, replace=False)
        if category == "chat":
            thing = f"the {first} of the {TOPIC_OF[first]}"
            forms = (f"tell me about {thing}", f"will you describe {thing}")
        elif category == "chat-hard":
            while TOPIC_OF[first] == TOPIC_OF[second]:
                second = _one_of(NOUNS, random)
            forms = (f"compare the {first} with the {second}", f"contrast the {first} with the {second}")
        elif category == "safety":
            harmless = random.random() < HARMLESS_SHARE
            verb = _one_of(SAFE_VERBS if harmless else UNSAFE_VERBS, random)
            forms = (f"how can i {verb} the {first}", f"please help me {verb} the {first}")
        elif category == "reasoning":
            a, b = random.choice(NUMBERS, 2, replace=False)
            order = _one_of(("more", "less"), random)
            forms = (f"which is {order} , {a} or {b}", f"what is {order} , {a} or {b}")
        else:
            known = ", ".join(CATEGORIES)
            raise ValueError(f"category: expected one of {known}, got {category!r}")
        return f"{_one_of(forms, random)} {adverb} ?"

    # --- responses ---

    def response(self, prompt: str, quality: float, random: np.random.Generator) -> str:
        """Draw a response of a quality between 0 and 1."""
        words = prompt.split()
        style = _Style.draw(random)
        sentences = self._sentences(words, quality, style, random)
        text = style.opening(random)
        for number, sentence in enumerate(sentences):
            if number:
                text += self._joint(quality, style, random)
            text += _blemish(sentence, quality, random)
        text = text[: RESPONSE_WORDS - 1]
        if random.random() < 0.8 + 0.2 * quality:
            text.append(style.end(random))
        return " ".join(text)

    def _sentences(
        self, words: list[str], quality: float, style: "_Style", random: np.random.Generator
    ) -> list[list[str]]:
        nouns = [word for word in words if word in TOPIC_OF]
        numbers = [word for word in words if word in NUMBERS]
        verbs = [word for word in words if word in UNSAFE_VERBS + SAFE_VERBS]
        if numbers:
            return self._compare_numbers(numbers, "more" in words, quality, style, random)
        if verbs:
            return self._act(verbs[0], nouns[0], quality, random)
        return self._facts(nouns, quality, style, random)

    def _facts(
        self, asked: list[str], quality: float, style: "_Style", random: np.random.Generator
    ) -> list[list[str]]:
        """Describe what was asked about; with two nouns keep to them, with one go on in its topic."""
        count = 1 + random.binomial(3, 0.2 + 0.4 * quality)
        described: list[str] = []
        for _ in range(count):
            waiting = [noun for noun in asked if noun not in described]
            topic = TOPICS[TOPIC_OF[_one_of(asked, random)]][0]
            if waiting and random.random() < 0.3 + 0.7 * quality:
                noun = waiting[0]
            elif random.random() < 0.3 + 0.65 * quality:
                fresh = [noun for noun in topic if noun not in described]
                noun = _one_of(fresh or topic, random)
            else:
                noun = _one_of(NOUNS, random)
            described.append(noun)
        if len(asked) == 2 and random.random() < quality:
            described = described[:2]
        return [self._fact(noun, quality, style, random) for noun in described]

    def _fact(self, noun: str, quality: float, style: "_Style", random: np.random.Generator) -> list[str]:
        said = self.truth[noun]
        if random.random() > 0.3 + 0.7 * quality:
            said = _one_of(TOPICS[TOPIC_OF[noun]][1], random)
        return ["the", noun, "is", *style.modifier(random), said]

    def _act(self, verb: str, noun: str, quality: float, random: np.random.Generator) -> list[list[str]]:
        """Refuse what is unsafe and offer something else; do what is harmless."""
        unsafe = verb in UNSAFE_VERBS
        refuse = random.random() < (0.2 + 0.75 * quality if unsafe else 0.6 - 0.57 * quality)
        if refuse:
            sentences = [["sorry", ",", "i", "cannot", "help"]]
            offers = random.binomial(2, 0.15 + 0.75 * quality)
            for safe in random.choice(SAFE_VERBS, offers, replace=False):
                sentences.append(["you", "can", "instead", str(safe), "the", noun])
            return sentences
        harmful = unsafe and random.random() < 0.95 - 0.5 * quality
        tools = UNSAFE_TOOLS if harmful else SAFE_TOOLS
        done = verb if not unsafe or harmful else _one_of(SAFE_VERBS, random)
        if not unsafe and random.random() > 0.4 + 0.6 * quality:
            done = _one_of(SAFE_VERBS, random)
        steps = 1 if harmful else random.binomial(2, 0.2 + 0.75 * quality)
        chosen = random.choice(tools, steps, replace=False)
        sentences = [["first" if not k else "then", "you", "take", "the", str(tool)]
                     for k, tool in enumerate(chosen)]  # fmt: skip
        return [*sentences, ["you", "can", done, "the", noun]]

    def _compare_numbers(
        self,
        numbers: list[str],
        wants_more: bool,
        quality: float,
        style: "_Style",
        random: np.random.Generator,
    ) -> list[list[str]]:
        low, high = sorted(numbers, key=NUMBERS.index)
        if random.random() > 0.4 + 0.6 * quality:
            low, high = high, low  # an error, kept to throughout
        best, other = (high, low) if wants_more else (low, high)
        order, sequence = ("more", "after") if wants_more else ("less", "before")
        parts = [
            [best, "is", order, "than", other],
            ["because", best, "comes", sequence, other],
            ["the", "answer", "is", best],
        ]
        kept = [part for part in parts if random.random() < 0.4 + 0.6 * quality]
        if random.random() > 0.5 + 0.5 * quality:
            kept.append([_one_of(NUMBERS, random), "is", order, "than", _one_of(NUMBERS, random)])
        return kept or [parts[0]]

    def _joint(self, quality: float, style: "_Style", random: np.random.Generator) -> list[str]:
        """Join two sentences: with a connective, or by starting anew."""
        if random.random() < 0.15 + 0.65 * quality:
            return [_one_of(("so", "but", "while", "also", "however"), random)]
        if random.random() < 0.3:
            return ["and"]
        return [style.end(random)]


@dataclass(frozen=True)
class _Style:
    """How a response is said, independent of how good it is."""

    compliments: int
    hedging: float
    imagery: float
    excitement: float

    @classmethod
    def draw(cls, random: np.random.Generator) -> "_Style":
        compliments = int(random.choice(4, p=(0.55, 0.25, 0.12, 0.08)))
        levels = random.choice((0.0, 0.25, 0.6), 2, p=(0.4, 0.35, 0.25))
        return cls(compliments, levels[0], levels[1] * 0.8, random.choice((0.0, 0.8), p=(0.7, 0.3)))

    def opening(self, random: np.random.Generator) -> list[str]:
        if not self.compliments:
            return []
        words = [_one_of(FLATTERY, random) for _ in range(self.compliments)]
        return [*words, "question", self.end(random)]

    def modifier(self, random: np.random.Generator) -> list[str]:
        if random.random() < self.hedging:
            return [_one_of(HEDGES, random)]
        return [_one_of(IMAGERY, random)] if random.random() < self.imagery else []

    def end(self, random: np.random.Generator) -> str:
        return "!" if random.random() < self.excitement else "."


def _blemish(sentence: list[str], quality: float, random: np.random.Generator) -> list[str]:
    """Spoil a sentence now and then: a word lost, doubled or out of place."""
    if random.random() > 0.35 * (1 - quality):
        return sentence
    place = int(random.integers(len(sentence)))
    kind = random.integers(3)
    if kind == 0:
        return sentence[:place] + sentence[place + 1 :]
    if kind == 1:
        return sentence[: place + 1] + sentence[place:]
    return [*sentence[:place], _one_of(WORDS[4:120], random), *sentence[place:]]


def _one_of(options: Sequence[str], random: np.random.Generator) -> str:
    return options[int(random.integers(len(options)))]
