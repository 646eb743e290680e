"""Notebook 10: how people disagree, and what reward models of few of them know about it.

What needs the packages of `make pretrained` is computed in the profile `pretrained` and committed
(data/results/people, without any of their texts); other profiles draw from that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from vaalign_lib.data.raters import held_out, read_raters
from vaalign_lib.profiles import OURS, Study
from vaalign_lib.rewards.base import Array
from vaalign_lib.rewards.rated_heads import (
    HeardHeads,
    HeardTexts,
    PeopleRatings,
    load_features,
    with_constant,
    write_features,
    write_heads,
)
from vaalign_lib.rewards.raters import HeardWords
from vaalign_lib.statistics.tests import CONFIDENCE, Estimate, mean, percentiles

CLASSES, NEAREST, RESAMPLES = 30, 50, 500  # of the mean rating; texts of like mean; of the bootstrap
MEMBERS, SEEDS = 10, 20  # heads of an ensemble, ensembles of each size
SIZES = tuple(product((500, 2000, 8000), (1, 3, 10)))  # texts of a head, people a text
MAIN = (2000, 1)
PENALTIES = tuple(10.0**power for power in np.arange(0, 6.1, 0.5))  # of ridge heads, in texts
LEAST = 0.01  # that a predicted variance counts as
Whole = NDArray[np.int64]


# --- what a study has of it -----------------------------------------------------------------------------


def heard_words(study: Study, seed: int) -> HeardWords:
    """Return the source of the row `people`."""
    assert study.profile.raters is not None
    return HeardWords(read_raters(study.profile.raters.words), seed)


def bench(study: Study) -> "Bench":
    """Return the texts that people have rated, with the encoder's features, read now or before.

    Raises:
        ValueError: the profile names no texts, or no encoder.
    """
    features = load_features(features_folder(study))
    return Bench(read_raters(_rated(study)["texts"]), features.astype(float), study.seed)


def _rated(study: Study) -> dict[str, Path]:
    raters, encoder = study.profile.raters, study.profile.reward_model.backbone
    if raters is None or raters.texts is None or encoder in OURS:
        raise ValueError("raters.texts, reward_model.backbone: expected rated texts and an encoder of them")
    return {"texts": Path(raters.texts), "encoder": Path(encoder)}


def features_folder(study: Study) -> Path:
    """Return the folder of the encoder's features of all texts, read now or before."""
    return study.store.folder("text-features", write_features, {}, _rated(study))


def heads_folder(study: Study, seed: int, policies: int) -> Path:
    """Return the folder of the row `heads`: a head for each policy, further ones, one that has heard all."""
    config = {"seed": seed, "policies": policies, "further": MEMBERS, "size": list(MAIN)}
    inputs = {"texts": _rated(study)["texts"], "features": features_folder(study)}
    return study.store.folder("heard-heads", write_heads, config, inputs)


def heard_heads(study: Study, seed: int, policies: int) -> HeardHeads:
    """Return the source of the row `heads`."""
    return HeardHeads.load(heads_folder(study, seed, policies), _rated(study)["encoder"])


def measured(study: Study) -> dict[str, pd.DataFrame]:
    """Return what is measured of people and of reward models, now or before: `disagreement`, `dome`,
    `reward_models`, `levels`.
    """
    inputs = _rated(study) | {"words": Path(study.profile.raters.words)}  # type: ignore[union-attr]

    def write_disagreement(folder: Path, **_: Any) -> None:
        texts, words = (read_raters(inputs[name]) for name in ("texts", "words"))
        both = [disagreement(one, np.random.default_rng([study.seed, 4])) for one in (texts, words)]
        pd.concat(both, ignore_index=True).to_parquet(folder / "disagreement.parquet")
        table = pd.concat([texts, words], ignore_index=True)
        dome(table, np.random.default_rng([study.seed, 5])).to_parquet(folder / "dome.parquet")

    def write_reward_models(folder: Path, **_: Any) -> None:
        known = bench(study)
        reward_models(known).to_parquet(folder / "reward_models.parquet")
        levels(known).to_parquet(folder / "levels.parquet")

    config, code = {"seed": study.seed}, (__name__,)
    places = [
        study.store.folder("disagreement", write_disagreement, config, inputs, code),
        study.store.folder("reward-models", write_reward_models, config, inputs, code),
    ]
    return {path.stem: pd.read_parquet(path) for place in places for path in place.glob("*.parquet")}


# --- how people disagree --------------------------------------------------------------------------------


def halves(ratings: PeopleRatings, random: np.random.Generator) -> tuple[Array, Array]:
    """Return means and variances (2, texts) of two halves of the people of each text, drawn at random."""
    order = random.random(ratings.said.shape)
    order[np.isnan(ratings.said)] = 2
    place = np.argsort(np.argsort(order, axis=1), axis=1)  # (texts, people)
    first = ratings.people[:, None] // 2
    parts = [place < first, (place >= first) & (place < ratings.people[:, None])]
    said = [np.where(part, ratings.said, np.nan) for part in parts]
    return np.stack([np.nanmean(one, 1) for one in said]), np.stack(
        [np.nanvar(one, 1, ddof=1) for one in said]
    )


def by_chance(ratings: PeopleRatings, random: np.random.Generator) -> Array:
    """Return the variance of as many ratings as each text has, drawn from the texts nearest in mean."""
    order = np.argsort(np.nanmean(ratings.said, axis=1), kind="stable")
    said, people = ratings.said[order], ratings.people[order]
    near = random.integers(-(NEAREST // 2), NEAREST // 2 + 1, said.shape) + np.arange(len(said))[:, None]
    near = np.clip(near, 0, len(said) - 1)
    drawn = said[near, (random.random(said.shape) * people[near]).astype(np.int64)]
    drawn[np.isnan(said)] = np.nan
    found = np.empty(len(said))
    found[order] = np.nanvar(drawn, axis=1, ddof=1)
    return found


def disagreement(texts: pd.DataFrame, random: np.random.Generator) -> pd.DataFrame:
    """Return a row for each domain, and for all texts together, of the protocol's part (a), with intervals.

    `texts` as of `data.raters`; chance and halves are drawn within domains.
    """
    rows, parts = [], []
    for domain, part in texts.groupby("domain", sort=False):
        ratings = PeopleRatings.of(part["ratings"].tolist())
        _, variances = halves(ratings, random)
        classes = pd.qcut(part["mean"], CLASSES, labels=False, duplicates="drop")
        of_class = part.groupby(classes)["variance"].transform("mean")
        known = pd.DataFrame(
            {
                "variance": part["variance"],
                "first": variances[0],
                "second": variances[1],
                "chance": by_chance(ratings, random),
                "class": of_class,
            }
        )
        parts.append(known)
        rows.append({"domain": domain, "people": float(part["people"].median())} | _shares(known, random))
    if len(parts) > 1:
        people = float(texts["people"].median())
        rows.append({"domain": "all", "people": people} | _shares(pd.concat(parts), random))
    return pd.DataFrame(rows)


def _shares(known: pd.DataFrame, random: np.random.Generator) -> dict[str, float]:
    """Return the mean variance, and of the variance of variances the shares `real`, `by_mean`, `beyond`."""

    def shares(rows: Any) -> list[Array]:
        variance, first, second, chance, of_class = (known[name].to_numpy()[rows] for name in known)
        total = variance.var(-1)
        centred = [one - one.mean(-1, keepdims=True) for one in (first, second)]
        half = (centred[0] * centred[1]).mean(-1) / np.sqrt(first.var(-1) * second.var(-1))
        return [2 * half / (1 + half), of_class.var(-1) / total, 1 - chance.var(-1) / total]

    drawn = random.integers(len(known), size=(RESAMPLES, len(known)))
    values, resampled = shares(np.arange(len(known))), shares(drawn)
    found = {"texts": len(known)} | mean(known["variance"]).columns("variance")
    for name, value, samples in zip(("real", "by_mean", "beyond"), values, resampled, strict=True):
        found |= percentiles(float(value), samples, len(known)).columns(name)
    return found


def dome(texts: pd.DataFrame, random: np.random.Generator, classes: int = 16) -> pd.DataFrame:
    """Return by domain and class of the mean rating: `mean`, texts' mean variance `variance` with the middle
    80% of texts (`low`, `high`), and these ends by chance (`chance_low`, `chance_high`).
    """
    rows = []
    for domain, part in texts.groupby("domain", sort=False):
        chance = by_chance(PeopleRatings.of(part["ratings"].tolist()), random)
        known = part[["mean", "variance"]].assign(chance=chance)
        for _, one in known.groupby(pd.cut(part["mean"], np.linspace(-4, 4, classes + 1))):
            if len(one) >= 20:
                ends = one[["variance", "chance"]].quantile([0.1, 0.9]).to_numpy()
                rows.append(
                    {"domain": domain, "texts": len(one), "mean": one["mean"].mean()}
                    | {"variance": one["variance"].mean(), "low": ends[0, 0], "high": ends[1, 0]}
                    | {"chance_low": ends[0, 1], "chance_high": ends[1, 1]}
                )
    return pd.DataFrame(rows)


# --- what reward models know about it -------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Texts with an encoder's features: those to learn from, and those held out with two halves of people."""

    texts: pd.DataFrame  # as of `data.raters`
    features: Array  # (texts, width)
    seed: int

    @cached_property
    def inputs(self) -> Array:
        return with_constant(self.features).astype(np.float32)  # (texts, width + 1)

    @cached_property
    def ratings(self) -> PeopleRatings:
        return PeopleRatings.of(self.texts["ratings"].tolist())

    @cached_property
    def parts(self) -> tuple[Whole, Whole]:
        """Places of the texts to learn from, and of those held out."""
        out = held_out(self.texts["text"])
        return np.flatnonzero(~out), np.flatnonzero(out)

    @cached_property
    def held_out(self) -> tuple[Array, Array]:
        """Means and variances of two halves of the people of texts that are held out (2, texts)."""
        rows = self.parts[1]
        ratings = PeopleRatings(self.ratings.said[rows], self.ratings.people[rows])
        return halves(ratings, np.random.default_rng([self.seed, 0]))

    def penalty(self, texts: int, people: int, squares: float | None = None) -> float:
        """Return the penalty with the smallest error of a head on texts that it has not heard about, of those
        that are not held out; with `squares`, that of a head of squared differences, of heads with this one.
        """
        random = np.random.default_rng([self.seed, 1, texts, people])
        learn = random.permutation(self.parts[0])
        rest, known = learn[:2000], learn[2000:]
        heard = HeardTexts.drawn(self.ratings, known, MEMBERS, min(texts, len(known)), people, random)
        known_to = heard.ridge(self.inputs)
        if squares is None:
            targets, aims = heard.ratings.mean(-1), np.nanmean(self.ratings.said[rest], axis=1)
        else:
            heads = known_to.fit(heard.ratings.mean(-1), squares)
            targets = squared(known_to.inputs, heard.ratings, heads)
            centre = self.inputs[rest] @ heads.mean(0)
            aims = np.nanmean((self.ratings.said[rest] - centre[:, None]) ** 2, axis=1)
        errors = [
            np.mean((self.inputs[rest] @ known_to.fit(targets, one).T - aims[:, None]) ** 2)
            for one in PENALTIES
        ]
        return PENALTIES[int(np.argmin(errors))]


def squared(inputs: Array, ratings: Array, heads: Array) -> Array:
    """Return the mean squared difference of ratings (heads, texts, people) from the other heads' rewards
    (heads, texts); inputs (heads, texts, width).
    """
    others = (heads.sum(0) - heads) / (len(heads) - 1)  # (heads, width)
    rewards = inputs @ others[..., None].astype(inputs.dtype)  # (heads, texts, 1)
    return np.asarray(((ratings - rewards) ** 2).mean(-1))


def estimates(bench: Bench, heard: HeardTexts, penalties: tuple[float, float]) -> dict[str, Array]:
    """Return of held-out texts the ensemble's `reward`, and three estimates of its variance (texts,)."""
    test, known_to = bench.inputs[bench.parts[1]].astype(float), heard.ridge(bench.inputs)
    heads = known_to.fit(heard.ratings.mean(-1), penalties[0])
    squares = squared(known_to.inputs, heard.ratings, heads)
    rewards = test @ heads.T  # (texts, heads)
    parabola = np.polynomial.Polynomial.fit((known_to.inputs @ heads.mean(0)).ravel(), squares.ravel(), 2)
    predicted = (test @ known_to.fit(squares, penalties[1]).T).mean(1)
    return {
        "reward": rewards.mean(1),
        "ensemble": rewards.var(1, ddof=1),
        "predicted": np.maximum(predicted, LEAST),
        "mean alone": np.maximum(parabola(rewards.mean(1)), LEAST),
    }


def standardized_ranks(values: Array, groups: Sequence[str] | None = None) -> Array:
    """Return ranks, in each group if there are any, with mean 0 and deviation 1 (texts,)."""
    keys = np.zeros(len(values)) if groups is None else np.asarray(groups)
    found = np.empty(len(values))
    for key in np.unique(keys):
        ranks = rankdata(values[keys == key])
        found[keys == key] = (ranks - ranks.mean()) / ranks.std()
    return found


def influence(first: Array, second: Array) -> tuple[float, Array]:
    """Return the correlation of standardized values, and how each text bears on it (texts,)."""
    products = first * second
    return float(products.mean()), products - products.mean() * (first**2 + second**2) / 2


def reward_models(bench: Bench, sizes: Sequence[tuple[int, int]] = SIZES, seeds: int = SEEDS) -> pd.DataFrame:
    """Return rank correlations of each estimate with the people's variance and with the squared error, by
    size and scope, with intervals over held-out texts and ensembles together (see the protocol).
    """
    means, variances = bench.held_out
    rows = bench.parts[1]
    domains = bench.texts["domain"].to_numpy()[rows]
    people = np.nanvar(bench.ratings.said[rows], axis=1, ddof=1)
    found = []
    for texts, count in sizes:
        first = bench.penalty(texts, count)
        penalties = first, bench.penalty(texts, count, first)
        values: dict[tuple[str, ...], list[tuple[float, Array]]] = {}
        for seed in range(seeds):
            random = np.random.default_rng([bench.seed, 2, texts, count, seed])
            heard = HeardTexts.drawn(bench.ratings, bench.parts[0], MEMBERS, texts, count, random)
            known = estimates(bench, heard, penalties)
            reward = known.pop("reward")
            errors = reward - means  # (2, texts)
            aims = {"people": people, "error": errors[0] * errors[1]}
            for scope, groups in (("within domains", domains), ("all texts", None)):
                ranks = {name: standardized_ranks(one, groups) for name, one in (known | aims).items()}
                for name, aim in product(known, aims):
                    values.setdefault((scope, name, aim), []).append(influence(ranks[name], ranks[aim]))
                both = [standardized_ranks(one**2, groups) for one in errors]
                values.setdefault((scope, "ceiling", "error"), []).append(influence(*both))
                halved = [standardized_ranks(one, groups) for one in variances]
                values.setdefault((scope, "ceiling", "people"), []).append(influence(*halved))
                gain = _difference(
                    values[scope, "predicted", "people"], values[scope, "mean alone", "people"]
                )
                values.setdefault((scope, "predicted minus mean alone", "people"), []).append(gain)
        for (scope, name, aim), one in values.items():
            about = {"texts": texts, "people": count, "scope": scope, "estimate": name, "against": aim}
            estimate = _pooled(one, ceiling=name == "ceiling")
            found.append(about | {"held_out": estimate.count} | estimate.columns("correlation"))
    return pd.DataFrame(found)


def _difference(first: list[tuple[float, Array]], second: list[tuple[float, Array]]) -> tuple[float, Array]:
    """Return the difference of the last correlations, and how each text bears on it."""
    return first[-1][0] - second[-1][0], first[-1][1] - second[-1][1]


def _pooled(found: list[tuple[float, Array]], ceiling: bool) -> Estimate:
    """Return the mean over ensembles with an interval over texts and ensembles; of halves the ceiling, the
    square root of what Spearman and Brown say of both together.
    """
    values = np.array([value for value, _ in found])
    borne = np.mean([one for _, one in found], axis=0)
    error = np.sqrt(borne.var() / len(borne) + values.var(ddof=1) / len(values))
    ends = values.mean() + error * norm.ppf((1 + CONFIDENCE) / 2) * np.array([0, -1, 1])
    if ceiling:
        ends = np.clip(ends, 1e-6, 1)
        ends = np.sqrt(2 * ends / (1 + ends))
    value, low, high = map(float, ends)
    return Estimate(value, low, high, len(borne))


def levels(bench: Bench, sizes: Sequence[tuple[int, int]] = SIZES) -> pd.DataFrame:
    """Return by size, of one ensemble: mean variances by the ensemble, predicted, and of people, the mean
    squared error of the reward, and the share of the people's means that the reward explains (`explained`).
    """
    means, variances = bench.held_out
    truth = np.cov(means)[0, 1]  # the variance of texts' means without people's noise
    rows = []
    for texts, count in sizes:
        first = bench.penalty(texts, count)
        random = np.random.default_rng([bench.seed, 2, texts, count, 0])
        heard = HeardTexts.drawn(bench.ratings, bench.parts[0], MEMBERS, texts, count, random)
        known = estimates(bench, heard, (first, bench.penalty(texts, count, first)))
        error = float(np.prod(known["reward"] - means, axis=0).mean())
        rows.append(
            {"texts": texts, "people": count, "penalty": first}
            | {name: float(known[name].mean()) for name in ("ensemble", "predicted")}
            | {"variance of people": float(variances.mean()), "squared error": error}
            | {"explained": 1 - error / truth}
        )
    return pd.DataFrame(rows)
