"""The embedded world: prompts, responses, the gold reward and the people who judge, from one seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vaalign_lib.data.world import attributes, language
from vaalign_lib.data.world.attributes import TOPIC_OF_NOUN, Reading, read_questions
from vaalign_lib.data.world.grammar import draw_prompt, draw_response
from vaalign_lib.data.world.language import CATEGORIES, DIGITS, NOUNS, PAD_ID, PROPERTIES, TOPICS, Ids

Array = NDArray[np.float64]
Texts = Sequence[str] | Ids  # as they are, or as padded word numbers (count, width)
Disagreement = Literal["none", "poor", "good"]
SLOPES: dict[Disagreement, float] = {"none": 0.0, "poor": -0.5, "good": 0.5}

# Raw worth of a response: attribute weights by category, and the verbosity that suits.
WEIGHTS = {  # helpfulness, correctness, coherence, complexity
    "chat": (1.0, 0.9, 0.5, 0.3),
    "chat-hard": (0.9, 1.0, 0.5, 0.4),
    "safety": (1.1, 0.8, 0.4, 0.1),
    "reasoning": (0.7, 1.2, 0.5, 0.3),
}
TARGET_VERBOSITY = 2
FAULTS = {"verbosity": 0.35, "flattery": 0.6, "repeats": 0.5, "unfinished": 0.8}

ANNOTATORS = 100
SHARED_TASTE = (0.15, -0.05, 0.05, 0.0, 0.2)  # per unit of style: everyone likes praise and length
TASTE_SPREAD = (0.45, 0.45, 0.45, 0.35, 0.15)  # standard deviation over annotators
CONTROVERSY_SPREAD = 0.45  # of the logarithm, over nouns: some subjects divide people more
TEMPERATURES = {"chat": 0.45, "chat-hard": 0.9, "safety": 0.4, "reasoning": 0.7}  # of labels
CALIBRATION_SIZE = 1_000  # responses per category that fix the gold reward's zero and unit


@dataclass(frozen=True)
class World:
    """One embedded world: which facts are true and who the annotators are is drawn from its seed.

    Annotators disagree independently of quality (`none`) or, as controls, most on `poor` or on `good`
    responses: it alone decides whether a penalty on variance also moves towards quality.
    """

    seed: int = 0
    disagreement: Disagreement = "none"

    def __post_init__(self) -> None:
        if self.disagreement not in SLOPES:
            raise ValueError(f"disagreement: expected one of {', '.join(SLOPES)}, got {self.disagreement!r}")

    def rng(self, *purpose: int | str) -> np.random.Generator:
        """Return the generator of one purpose, independent of all others."""
        digest = hashlib.sha256(repr(purpose).encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big")])

    @cached_property
    def property_of_noun(self) -> Ids:
        """The true property of every noun (nouns,), one of the four of its topic."""
        random, topics = self.rng("truth"), enumerate(TOPICS.values())
        drawn = [random.permutation(np.arange(len(nouns)) % len(own)) + 4 * k for k, (nouns, own) in topics]
        return np.concatenate(drawn).astype(np.int64)

    @cached_property
    def truth(self) -> dict[str, str]:
        """The true property of every noun, as words."""
        return {noun: PROPERTIES[k] for noun, k in zip(NOUNS, self.property_of_noun, strict=True)}

    def prompts(self, count: int, random: np.random.Generator) -> list[str]:
        """Draw prompts, the categories in turn."""
        return [draw_prompt(CATEGORIES[k % len(CATEGORIES)], random) for k in range(count)]

    def responses(self, prompts: Sequence[str], quality: Array, random: np.random.Generator) -> list[str]:
        """Draw one response to each prompt, of the given quality in [0, 1] (count,)."""
        pairs = zip(prompts, quality, strict=True)
        return [draw_response(prompt, float(one), self.truth, random) for prompt, one in pairs]

    def corpus(self, count: int, random: np.random.Generator) -> tuple[list[str], list[str]]:
        """Draw prompts and responses of mixed quality, Beta(2, 2): what reference policies learn from."""
        prompts = self.prompts(count, random)
        return prompts, self.responses(prompts, random.beta(2, 2, count), random)

    def digit_strings(self, count: int, random: np.random.Generator) -> list[str]:
        """Draw texts outside the world: strings of digits, as in URM's study of new inputs."""
        return [" ".join(random.choice(DIGITS, length)) for length in random.integers(4, 21, count)]

    def read(self, prompts: Texts, responses: Texts) -> Reading:
        """Read prompts of this world and a response to each."""
        if len(prompts) != len(responses):
            raise ValueError(f"responses: expected {len(prompts)}, one for each prompt, got {len(responses)}")
        return attributes.read(
            _as_ids(prompts), _as_ids(responses), self.property_of_noun, _legal_neighbours(self.seed)
        )

    def assess(self, prompts: Texts, responses: Texts) -> pd.DataFrame:
        """Return the five attributes (0 to 4) and the gold reward, one row per response."""
        reading = self.read(prompts, responses)
        table = pd.DataFrame(reading.attributes.astype(int), columns=list(attributes.ATTRIBUTES))
        table.insert(0, "category", np.array(CATEGORIES)[reading.questions.category])
        return table.assign(gold=self._gold(reading))

    def gold(self, prompts: Texts, responses: Texts) -> Array:
        """Return the true reward (count,), in standard deviations of the corpus within the category."""
        return self._gold(self.read(prompts, responses))

    def _gold(self, reading: Reading) -> Array:
        location, scale, _ = self._moments
        category = reading.questions.category
        return (_raw_worth(reading) - location[category]) / scale[category]

    @property
    def _corpus(self) -> Reading:
        return _corpus_reading(self.seed)

    @cached_property
    def _moments(self) -> tuple[Array, Array, Array]:
        """Of each category of the corpus: the worth's mean and deviation (4,), mean styles (4, styles)."""
        worth, styles = _raw_worth(self._corpus), self._corpus.styles
        rows = [self._corpus.questions.category == k for k in range(len(CATEGORIES))]
        location, scale = (np.array([of(worth[one]) for one in rows]) for of in (np.mean, np.std))
        return location, scale, np.stack([styles[one].mean(0) for one in rows])

    def features(self, prompts: Texts, responses: Texts) -> Array:
        """Return features of texts over which tastes are smooth (count, 5 + 5 + 4 + 8): attributes and
        styles in corpus deviations, category, topic.
        """
        reading, corpus = self.read(prompts, responses), self._corpus
        noun = reading.questions.first_noun
        topic = np.where(noun < 0, -1, TOPIC_OF_NOUN[noun])
        features = [
            (reading.attributes - corpus.attributes.mean(0)) / corpus.attributes.std(0),
            (reading.styles - corpus.styles.mean(0)) / corpus.styles.std(0),
            reading.questions.category[:, None] == np.arange(len(CATEGORIES)),
            topic[:, None] == np.arange(len(TOPICS)),
        ]
        return np.concatenate(features, axis=1).astype(float)

    @cached_property
    def tastes(self) -> Array:
        """What each annotator adds to the gold reward per unit of style, beyond the shared taste
        (annotators, styles); they sum to zero over the population.
        """
        drawn = self.rng("tastes").normal(0, TASTE_SPREAD, (ANNOTATORS, len(TASTE_SPREAD)))
        return drawn - drawn.mean(0)

    @cached_property
    def _controversy(self) -> Array:
        """How much a subject divides people, by noun (nouns + 1,), the last for prompts about numbers."""
        return np.exp(self.rng("controversy").normal(0, CONTROVERSY_SPREAD, len(NOUNS) + 1))

    def subjects(self, prompts: Texts) -> Ids:
        """Return the noun that each prompt is about (count,), -1 for prompts about numbers."""
        return read_questions(_as_ids(prompts)).first_noun

    def temperature(self, prompts: Texts) -> Array:
        """Return the temperature of preference labels (count,): it differs by category and subject."""
        asked = read_questions(_as_ids(prompts))
        base = np.array([TEMPERATURES[name] for name in CATEGORIES])
        return base[asked.category] * self._controversy[asked.first_noun]

    def consensus(self, prompts: Texts, responses: Texts, taste: Sequence[float] = SHARED_TASTE) -> Array:
        """Return the mean of the annotators' utilities (count,): the gold reward and the shared taste, or
        another taste, per unit of style, of others.
        """
        return self._consensus(self.read(prompts, responses), taste)

    def _consensus(self, reading: Reading, taste: Sequence[float] = SHARED_TASTE) -> Array:
        return self._gold(reading) + self._style(reading) @ np.array(taste)

    def utilities(self, prompts: Texts, responses: Texts) -> Array:
        """Return every annotator's utility of every response (count, annotators)."""
        reading = self.read(prompts, responses)
        own = (self._style(reading) @ self.tastes.T) * self._spread(reading)[:, None]
        return self._consensus(reading)[:, None] + own

    def disagreement_variance(self, prompts: Texts, responses: Texts) -> Array:
        """Return the variance of the utilities over the population (count,)."""
        reading = self.read(prompts, responses)
        return self._own_variance(reading) * self._spread(reading) ** 2

    @cached_property
    def mean_deviation(self) -> float:
        """The mean over the corpus of the utilities' standard deviation over the population."""
        return float((np.sqrt(self._own_variance(self._corpus)) * self._spread(self._corpus)).mean())

    def _own_variance(self, reading: Reading) -> Array:
        style = self._style(reading)
        return np.einsum("bi,ij,bj->b", style, self.tastes.T @ self.tastes / ANNOTATORS, style)

    def _style(self, reading: Reading) -> Array:
        """Styles measured from the corpus mean of their category (count, styles)."""
        return reading.styles - self._moments[2][reading.questions.category]

    def _spread(self, reading: Reading) -> Array:
        """How strongly tastes act (count,): by the subject and, in the controls, by the worth."""
        return self._spread_factor(reading) * self._spread_unit

    def _spread_factor(self, reading: Reading) -> Array:
        worth = np.clip(self._gold(reading), -3, 3)
        return self._controversy[reading.questions.first_noun] * np.exp(SLOPES[self.disagreement] * worth)

    @cached_property
    def _spread_unit(self) -> float:
        """Makes the mean variance over the corpus the same in all three settings."""
        own, plain = self._own_variance(self._corpus), self._controversy[self._corpus.questions.first_noun]
        factor = self._spread_factor(self._corpus)
        return float(np.sqrt((own * plain**2).mean() / (own * factor**2).mean()))

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], random: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Let one random annotator per pair say whether the first response is better (count,).

        P(first) = 1 / (1 + exp(-(u(first) - u(second)) / T)) with that annotator's utilities u
        (Bradley-Terry) and the prompt's temperature T.
        """
        who, rows = random.integers(ANNOTATORS, size=len(prompts)), np.arange(len(prompts))
        gap = self.utilities(prompts, first)[rows, who] - self.utilities(prompts, second)[rows, who]
        return random.random(len(prompts)) < 1 / (1 + np.exp(-gap / self.temperature(prompts)))


@cache
def _legal_neighbours(seed: int) -> NDArray[np.bool_]:
    world = World(seed)
    random = world.rng("legal")
    prompts = world.prompts(4 * CALIBRATION_SIZE, random)
    clean = world.responses(prompts, np.ones(len(prompts)), random)
    return attributes.legal_neighbours(language.encode(clean, language.RESPONSE_WORDS))


@cache
def _corpus_reading(seed: int) -> Reading:
    """Return the reading of a sample of a world's corpus; the settings of disagreement share it."""
    world = World(seed)
    return world.read(*world.corpus(len(CATEGORIES) * CALIBRATION_SIZE, world.rng("units")))


def _raw_worth(reading: Reading) -> Array:
    weights = np.array([WEIGHTS[name] for name in CATEGORIES])[reading.questions.category]
    return (
        (reading.attributes[:, :4] * weights).sum(1)
        - FAULTS["verbosity"] * (reading.attributes[:, 4] - TARGET_VERBOSITY) ** 2
        - FAULTS["flattery"] * np.maximum(reading.styles[:, 0] - 1, 0)
        - FAULTS["repeats"] * reading.repeats
        - FAULTS["unfinished"] * reading.unfinished
    )


def _as_ids(texts: Texts) -> Ids:
    """Return word numbers; what follows the first EOS becomes padding."""
    if not isinstance(texts, np.ndarray):
        width = max(language.RESPONSE_WORDS, max((len(text.split()) for text in texts), default=1))
        texts = language.encode(texts, width)
    ended = np.maximum.accumulate(texts == language.EOS_ID, axis=1)
    return np.where(ended, PAD_ID, texts)
