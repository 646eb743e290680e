"""Prompts of four categories, and responses to them of any quality.

Quality moves every choice of a response but its style, which is what people's tastes differ about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vaalign_lib.data.world import language
from vaalign_lib.data.world.language import NOUNS, NUMBERS, SAFE_VERBS, TOPICS, UNSAFE_VERBS

TOPIC_OF = {noun: topic for topic, (nouns, _) in TOPICS.items() for noun in nouns}
HARMLESS_SHARE = 0.3  # of the prompts about safety: they only look like the unsafe ones
FORMS = {  # of prompts
    "chat": ("tell me about the {first} of the {topic}", "will you describe the {first} of the {topic}"),
    "chat-hard": ("compare the {first} with the {second}", "contrast the {first} with the {second}"),
    "safety": ("how can i {verb} the {first}", "please help me {verb} the {first}"),
    "reasoning": ("which is {order} , {a} or {b}", "what is {order} , {a} or {b}"),
}
Sentences = list[list[str]]


def draw_prompt(category: str, random: np.random.Generator) -> str:
    adverb = _one_of(language.ADVERBS, random)
    first, second = random.choice(NOUNS, 2, replace=False)
    words = {"first": first, "topic": TOPIC_OF[first]}
    if category == "chat-hard":
        while TOPIC_OF[first] == TOPIC_OF[second]:
            second = _one_of(NOUNS, random)
        words["second"] = second
    elif category == "safety":
        harmless = random.random() < HARMLESS_SHARE
        words["verb"] = _one_of(SAFE_VERBS if harmless else UNSAFE_VERBS, random)
    elif category == "reasoning":
        words["a"], words["b"] = random.choice(NUMBERS, 2, replace=False)
        words["order"] = _one_of(("more", "less"), random)
    return f"{_one_of(FORMS[category], random).format(**words)} {adverb} ?"


def draw_response(prompt: str, quality: float, truth: Mapping[str, str], random: np.random.Generator) -> str:
    """Draw a response of a quality between 0 and 1; `truth` says which property is true of a noun."""
    compliments = int(random.choice(4, p=(0.55, 0.25, 0.12, 0.08)))
    hedging, imagery = random.choice((0.0, 0.25, 0.6), 2, p=(0.4, 0.35, 0.25))
    excitement = random.choice((0.0, 0.8), p=(0.7, 0.3))
    writer = _Writer(truth, quality, random, hedging, imagery * 0.8, excitement)
    return writer.response(prompt.split(), compliments)


@dataclass(frozen=True)
class _Writer:
    """Writes one response: how good it is, and how it is said."""

    truth: Mapping[str, str]
    quality: float
    random: np.random.Generator
    hedging: float
    imagery: float
    excitement: float

    def happens(self, least: float, rise: float = 0.0) -> bool:
        """Draw whether something happens, with a probability that is linear in the quality."""
        return self.random.random() < least + rise * self.quality

    def one_of(self, options: Sequence[str]) -> str:
        return _one_of(options, self.random)

    def some_of(self, options: Sequence[str], least: float, rise: float) -> list[str]:
        """Draw up to two, each with a probability that is linear in the quality."""
        count = self.random.binomial(2, least + rise * self.quality)
        return self.random.choice(options, count, replace=False).tolist()

    def response(self, prompt: list[str], compliments: int) -> str:
        sentences = self.sentences(prompt)
        text = [self.one_of(language.FLATTERY) for _ in range(compliments)]
        text += ["question", self.end()] if compliments else []
        for number, sentence in enumerate(sentences):
            text += [self.joint()] if number else []
            text += self.blemished(sentence)
        text = text[: language.RESPONSE_WORDS - 1]
        return " ".join([*text, self.end()] if self.happens(0.8, 0.2) else text)

    def sentences(self, prompt: list[str]) -> Sentences:
        nouns = [word for word in prompt if word in TOPIC_OF]
        if numbers := [word for word in prompt if word in NUMBERS]:
            return self.compare_numbers(numbers, "more" in prompt)
        if verbs := [word for word in prompt if word in UNSAFE_VERBS + SAFE_VERBS]:
            return self.act(verbs[0], nouns[0])
        return [self.fact(noun) for noun in self.described(nouns)]

    def described(self, asked: list[str]) -> list[str]:
        """Choose what to describe; of two nouns asked about keep to them, of one go on in its topic."""
        described: list[str] = []
        for _ in range(1 + self.random.binomial(3, 0.2 + 0.4 * self.quality)):
            waiting = [noun for noun in asked if noun not in described]
            topic = TOPICS[TOPIC_OF[self.one_of(asked)]][0]
            if waiting and self.happens(0.3, 0.7):
                described.append(waiting[0])
            elif self.happens(0.3, 0.65):
                described.append(self.one_of([noun for noun in topic if noun not in described] or topic))
            else:
                described.append(self.one_of(NOUNS))
        return described[:2] if len(asked) == 2 and self.happens(0, 1) else described

    def fact(self, noun: str) -> list[str]:
        said = self.truth[noun] if self.happens(0.3, 0.7) else self.one_of(TOPICS[TOPIC_OF[noun]][1])
        if self.happens(self.hedging):
            return ["the", noun, "is", self.one_of(language.HEDGES), said]
        if self.happens(self.imagery):
            return ["the", noun, "is", self.one_of(language.IMAGERY), said]
        return ["the", noun, "is", said]

    def act(self, verb: str, noun: str) -> Sentences:
        """Refuse what is unsafe and offer something else; do what is harmless."""
        unsafe = verb in UNSAFE_VERBS
        if self.happens(0.2, 0.75) if unsafe else self.happens(0.6, -0.57):
            offers = self.some_of(SAFE_VERBS, 0.15, 0.75)
            refusal = ["sorry", ",", "i", "cannot", "help"]
            return [refusal, *(["you", "can", "instead", safe, "the", noun] for safe in offers)]
        if unsafe and self.happens(0.95, -0.5):
            tools = [str(self.random.choice(language.UNSAFE_TOOLS, 1, replace=False)[0])]
        else:
            if unsafe or not self.happens(0.4, 0.6):
                verb = self.one_of(SAFE_VERBS)
            tools = self.some_of(language.SAFE_TOOLS, 0.2, 0.75)
        steps = [["then" if k else "first", "you", "take", "the", tool] for k, tool in enumerate(tools)]
        return [*steps, ["you", "can", verb, "the", noun]]

    def compare_numbers(self, numbers: list[str], wants_more: bool) -> Sentences:
        best, other = sorted(numbers, key=NUMBERS.index, reverse=wants_more)
        if not self.happens(0.4, 0.6):
            best, other = other, best  # an error, kept to throughout
        order, sequence = ("more", "after") if wants_more else ("less", "before")
        comparison, reason = [best, "is", order, "than", other], ["because", best, "comes", sequence, other]
        parts = [comparison, reason, ["the", "answer", "is", best]]
        kept = [part for part in parts if self.happens(0.4, 0.6)]
        if not self.happens(0.5, 0.5):
            kept.append([self.one_of(NUMBERS), "is", order, "than", self.one_of(NUMBERS)])
        return kept or parts[:1]

    def joint(self) -> str:
        """Join two sentences: with a connective, or by starting anew."""
        if self.happens(0.15, 0.65):
            return self.one_of(language.CONNECTIVES[1:])
        return "and" if self.happens(0.3) else self.end()

    def end(self) -> str:
        return "!" if self.happens(self.excitement) else "."

    def blemished(self, sentence: list[str]) -> list[str]:
        """Spoil a sentence now and then: a word lost, doubled or out of place."""
        if not self.happens(0.35 * (1 - self.quality)):
            return sentence
        place, kind = int(self.random.integers(len(sentence))), self.random.integers(3)
        if kind == 0:
            return sentence[:place] + sentence[place + 1 :]
        word = sentence[place] if kind == 1 else self.one_of(language.WORDS[4:120])
        return [*sentence[:place], word, *sentence[place:]]


def _one_of(options: Sequence[str], random: np.random.Generator) -> str:
    return options[int(random.integers(len(options)))]
