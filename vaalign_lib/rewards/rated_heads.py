"""Reward models of what people rated: ridge heads on the mean of a frozen encoder's states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.stats import norm, rankdata
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.data.raters import held_out, read_raters
from vaalign_lib.models import load_tokenizer
from vaalign_lib.rewards.base import Array, Interval, Judgement, PolicyIndex
from vaalign_lib.rewards.simulated_judge import fourier_features

TOKENS, ROWS = 256, 64  # of a text at most, as sentence-transformers has it; texts of one pass
LENGTH_SCALE, FREQUENCIES = 1.0, 256  # of the placebo's field, where features have length one
PENALTY = 1000.0  # of ridge heads, as the rule of data/protocols/10.md chose it
FEATURES, HEADS = "features.safetensors", "heads.safetensors"
Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen encoder; a text's features are the mean of its last states, scaled to length one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: str | Path) -> "Encoder":
        """Load an encoder of transformers, from safetensors."""
        return cls(AutoModel.from_pretrained(folder, use_safetensors=True).eval(), load_tokenizer(folder))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Array:
        """Return features (texts, width); texts of like length are read together."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
        found = np.empty((len(ids), self.model.config.hidden_size))
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for rows in (order[first : first + ROWS] for first in range(0, len(order), ROWS)):
            batch: Any = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            batch = batch.to(self.model.device)
            states = self.model(**batch).last_hidden_state.float()  # (rows, tokens, width)
            mask = batch["attention_mask"][..., None]  # (rows, tokens, 1)
            means = (states * mask).sum(1) / mask.sum(1)  # (rows, width)
            found[rows] = torch.nn.functional.normalize(means, dim=1).double().cpu().numpy()
        return found


# --- ridge heads ----------------------------------------------------------------------------------------


def with_constant(features: NDArray[Any]) -> NDArray[Any]:
    """Append the constant that heads have beside features (texts, width + 1)."""
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)


def ridge(inputs: NDArray[Any], targets: Array, penalty: float) -> Array:
    """Return the weights (heads, width) of ridge regressions, each on texts of its own, see `Ridge`."""
    return Ridge.of(inputs).fit(targets, penalty)


@dataclass(frozen=True)
class Ridge:
    """Ridge regressions on the same inputs (heads, texts, width), which end with the constant, that is not
    penalized. The penalty is in texts: so many of no reward, with features of length one.
    """

    inputs: NDArray[Any]
    gram: Array  # (heads, width, width)

    @classmethod
    def of(cls, inputs: NDArray[Any]) -> "Ridge":
        """Prepare inputs."""
        return cls(inputs, (np.swapaxes(inputs, 1, 2) @ inputs).astype(float))

    def fit(self, targets: Array, penalty: float) -> Array:
        """Return weights (heads, width) for targets (heads, texts)."""
        width = self.inputs.shape[2]
        added = np.diag(np.append(np.full(width - 1, penalty / (width - 1)), 0))  # (width, width)
        right = np.swapaxes(self.inputs, 1, 2) @ targets[..., None].astype(self.inputs.dtype)
        return np.asarray(np.linalg.solve(self.gram + added, right.astype(float))[..., 0])


@dataclass(frozen=True)
class PeopleRatings:
    """What people said of texts, as one table."""

    said: Array  # (texts, people), NaN where fewer were asked
    people: Whole  # (texts,)

    @classmethod
    def of(cls, ratings: Sequence[Array]) -> "PeopleRatings":
        """Arrange lists of ratings."""
        people = np.array([len(one) for one in ratings])
        said = np.full((len(ratings), people.max()), np.nan)
        for row, one in zip(said, ratings, strict=True):
            row[: len(one)] = one
        return cls(said, people)

    def heard(self, texts: Whole, count: int, random: np.random.Generator) -> Array:
        """Return what so many different people said of each text, drawn at random (*texts, count)."""
        order = random.random((*texts.shape, self.said.shape[1]))  # (*texts, people)
        order[np.isnan(self.said[texts])] = 2  # who was not asked comes last
        chosen = np.argpartition(order, count - 1, axis=-1)[..., :count]  # (*texts, count)
        return np.take_along_axis(self.said[texts], chosen, axis=-1)


@dataclass(frozen=True)
class HeardTexts:
    """Texts that each head has heard people about, and what these said."""

    texts: Whole  # (heads, texts)
    ratings: Array  # (heads, texts, people)

    @classmethod
    def drawn(
        cls,
        ratings: PeopleRatings,
        among: Whole,
        heads: int,
        texts: int,
        people: int,
        random: np.random.Generator,
    ) -> "HeardTexts":
        """Draw texts for each head, each once, and people who rated them."""
        places = np.argsort(random.random((heads, len(among))), axis=1)[:, :texts]  # (heads, texts)
        chosen = among[places]
        return cls(chosen, ratings.heard(chosen, people, random))

    def ridge(self, inputs: NDArray[Any]) -> Ridge:
        """Return the regressions on what each head has heard; `inputs` are of all texts there are."""
        return Ridge.of(inputs[self.texts])


# --- for the run store ----------------------------------------------------------------------------------


def write_features(folder: Path, texts: Path, encoder: Path) -> None:
    """Read all texts of a file of ratings once."""
    features = Encoder.load(encoder)(read_raters(texts)["text"].tolist())
    save_file({"features": features.astype(np.float32)}, folder / FEATURES)


def load_features(folder: Path) -> NDArray[np.float32]:
    """Return the features that were written (texts, width)."""
    return np.asarray(load_file(folder / FEATURES)["features"])


def write_heads(
    folder: Path, seed: int, policies: int, further: int, size: tuple[int, int], texts: Path, features: Path
) -> None:
    """Train a head for each policy, `further` ones, and one that has heard everybody of all texts; none of
    texts that are held out. `size`: texts of a head, people a text.
    """
    table = read_raters(texts)
    ratings = PeopleRatings.of(table["ratings"].tolist())
    inputs = with_constant(load_features(features)).astype(np.float32)
    learn = np.flatnonzero(~held_out(table["text"]))
    random = np.random.default_rng([seed, 3])
    heard = HeardTexts.drawn(ratings, learn, policies + further, *size, random)
    ratings_heard = zip(heard.texts, heard.ratings.mean(-1), strict=True)
    heads = np.concatenate([ridge(inputs[one][None], said[None], PENALTY) for one, said in ratings_heard])
    truth = ridge(inputs[learn][None], np.nanmean(ratings.said[learn], axis=1)[None], PENALTY)
    found = {"own": heads[:policies], "further": heads[policies:], "truth": truth[0]}
    save_file({name: np.ascontiguousarray(one) for name, one in found.items()}, folder / HEADS)


# --- as a source of rewards -----------------------------------------------------------------------------


@dataclass(frozen=True)
class HeardHeads:
    """Rewards by ridge heads on an encoder, each of people of its own: the `independent` protocol.

    Policy j is judged by head j alone; the variance is that over further heads, the same for all policies.
    The true reward is by a head that has heard everybody. Prompts are not read.
    """

    encoder: Encoder
    own: Array  # (policies, width + 1)
    further: Array  # (heads, width + 1)
    truth: Array  # (width + 1,)

    @classmethod
    def load(cls, folder: Path, encoder: str | Path) -> "HeardHeads":
        """Load heads that `write_heads` has written."""
        held = load_file(folder / HEADS)
        return cls(Encoder.load(encoder), *(held[name] for name in ("own", "further", "truth")))

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Judge responses by the heads of the policies that wrote them, as the middle of an interval as wide
        as the further heads differ.
        """
        inputs = self.inputs(responses)
        middle = np.einsum("bw,bw->b", inputs, self.own[policy])  # (responses,)
        half = np.sqrt(3 * (inputs @ self.further.T).var(1, ddof=1))  # (responses,)
        return Interval(np.stack([middle - half, middle + half], axis=1), np.full(len(responses), 0.5))

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the reward by the head that has heard everybody (responses,)."""
        return np.asarray(self.inputs(responses) @ self.truth)

    def inputs(self, responses: Sequence[str]) -> Array:
        """Return what heads see (responses, width + 1)."""
        return with_constant(_read(self.encoder, tuple(responses)))


@lru_cache(maxsize=2)  # judged, then compared with the truth
def _read(encoder: Encoder, texts: tuple[str, ...]) -> Array:
    return encoder(texts)


@dataclass(frozen=True)
class SmoothField:
    """A placebo: weights of the penalty are a smooth random field over the encoder's features, mapped to the
    distribution of the source's variance over a sample of responses. There the field is uncorrelated with
    the variance and correlated with the true reward as the variance is (normal scores).
    """

    source: HeardHeads
    sample: tuple[str, ...]  # responses of the reference policy
    seed: int

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Judge responses as the source does, with the placebo's weights."""
        return replace(self.source.judge(prompts, responses, policy), weights=self.weights(responses))

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the source's true reward (responses,)."""
        return self.source.true_reward(judgement, prompts, responses)

    def weights(self, responses: Sequence[str]) -> Array:
        """Return the weights (responses,)."""
        field, variances, drawn = self._fitted
        place = np.searchsorted(field, self._waves(responses) @ drawn) / field.size
        return np.asarray(np.quantile(variances, place))

    @cached_property
    def _fitted(self) -> tuple[Array, Array, Array]:
        """The field and the variances over the sample, each sorted; the coefficients of the waves."""
        asked, nobody = [""] * len(self.sample), np.zeros(len(self.sample), dtype=np.int64)
        judgement = self.source.judge(asked, self.sample, nobody)
        variances = judgement.variance()
        truth = self.source.true_reward(judgement, asked, self.sample)
        known = np.stack([norm.ppf((rankdata(one) - 0.5) / one.size) for one in (variances, truth)])
        known /= known.std(axis=1, keepdims=True)
        waves = self._waves(self.sample)  # (sample, waves)
        centred = waves - waves.mean(0)
        drawn = np.random.default_rng([self.seed, 1]).standard_normal(waves.shape[1])
        drawn /= (centred @ drawn).std()
        matrix = known @ centred / len(centred)  # covariances are matrix @ drawn
        wanted = np.array([0.0, np.mean(known[0] * known[1])])
        drawn = drawn + np.linalg.pinv(matrix, rcond=1e-3) @ (wanted - matrix @ drawn)
        return np.sort(waves @ drawn), np.sort(variances), drawn

    def _waves(self, responses: Sequence[str]) -> Array:
        random = np.random.default_rng([self.seed, 0])
        features = self.source.inputs(responses)[:, :-1]
        return fourier_features(features, random, LENGTH_SCALE, FREQUENCIES)
