"""The feature bench in the embedded world: what weights must know of a judge's errors to be of use.

Texts are drawn from the world's own grammar, so that a bench depends on its seed alone and not on a machine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy.special import ndtr
from scipy.stats import spearmanr

from vaalign_lib.data.world import language
from vaalign_lib.data.world.world import Disagreement, World
from vaalign_lib.jobs import report, run_jobs
from vaalign_lib.profiles import Study
from vaalign_lib.rewards.base import Interval
from vaalign_lib.rewards.simulated_judge import fourier_features
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import mean
from vaalign_lib.store import RESULTS, RunStore, content_key
from vaalign_lib.theory.feature_bench import Bench, Objective, Policies, at_kl
from vaalign_lib.theory.variance_weights import correlated, placebo

Noise = Literal["persistent", "fresh"]
PROMPTS, RESPONSES, POLICIES = 96, 160, 80
RHOS = (-1.0, -0.5, 0.0, 0.3, 0.5, 0.7, 1.0)
WORLDS = tuple(range(20))
TARGET = 0.5  # nats
LINEAR_TARGET, LINEAR_RHOS = 0.1, (-1.0, 0.0, 1.0)  # of policies linear in features
LENGTH_SCALE, FREQUENCIES = 2.0, 256  # of judges' tastes, as of `simulated_judge.PersistentJudges`
KEEPING_GOLD = "placebo that keeps gold"
PUBLISHED = "dose_response_worlds"  # a table


@dataclass(frozen=True)
class Texts:
    """Stored responses: features (P, S, d) of texts; gold, consensus and variance (P, S)."""

    features: Array
    gold: Array
    consensus: Array
    variance: Array

    @property
    def varying(self) -> Array:
        """The features that differ between responses to one prompt, from their means and in units of their
        deviations within prompts.
        """
        centred = self.features - self.features.mean(1, keepdims=True)
        deviation = centred.std((0, 1))
        return centred[..., deviation > 0] / deviation[deviation > 0]


def stored_texts(world: World, prompts: int = PROMPTS, responses: int = RESPONSES) -> Texts:
    """Draw prompts of a world and responses of mixed quality to each, Beta(2, 2) as in its corpus."""
    random = world.rng("feature bench")
    asked = [prompt for prompt in world.prompts(prompts, random) for _ in range(responses)]
    answers = world.responses(asked, random.beta(2, 2, len(asked)), random)
    texts = [language.encode(some, language.RESPONSE_WORDS) for some in (asked, answers)]
    shape = prompts, responses
    return Texts(
        world.features(*texts).reshape(*shape, -1),
        *(of(*texts).reshape(shape) for of in (world.gold, world.consensus, world.disagreement_variance)),
    )


def judge_errors(texts: Texts, noise: Noise, random: np.random.Generator, policies: int = POLICIES) -> Array:
    """Draw the errors (N, P, S) of each policy's judge, uniform with the texts' variance at every text.

    A persistent judge rates like texts alike: its error lies at the quantile Phi(Z(text)), with a Gaussian
    field Z on the features. Fresh answers are independent between responses, each of which a policy asks
    about once and then knows by heart: with exact sums, answers that are fresh at every step would cancel.
    """
    if noise not in get_args(Noise):
        raise ValueError(f"noise: expected persistent or fresh, got {noise!r}")
    shape = policies, *texts.gold.shape
    if noise == "fresh":
        uniforms = random.random(shape)
    else:
        flat = texts.features.reshape(-1, texts.features.shape[-1])
        waves = fourier_features(flat, random, LENGTH_SCALE, FREQUENCIES)
        uniforms = ndtr(random.standard_normal((policies, 2 * FREQUENCIES)) @ waves.T).reshape(shape)
    return (2 * uniforms - 1) * np.sqrt(3 * texts.variance)


def bench_of(
    texts: Texts, noise: Noise, random: np.random.Generator, policies: int = POLICIES, linear: bool = False
) -> Bench:
    """Return a bench of policies free to weigh every response, or of `linear` ones in the features."""
    errors = judge_errors(texts, noise, random, policies)
    features = texts.varying if linear else None
    return Bench(features, texts.gold, texts.consensus, texts.variance, errors)


def objective(name: str, variance: Array, consensus: Array, strength: float = 1.0) -> Objective:
    """Return one of `training.objectives` on a bench whose judges have that mean and variance."""
    half = np.sqrt(3 * variance)
    interval = Interval(np.stack([consensus - half, consensus + half], axis=-1).reshape(-1, 2))
    found = {
        "vanilla": Objective(),
        "variance_aware": Objective(weights=variance),
        "variance_aware_exact": Objective(weights=variance, stated=True),
        "uwo": Objective(cost=strength * variance),
        "worst_case": Objective(cost=half, trust=0),
        "reward_robust": Objective(cost=(1 - strength) * half, trust=strength),
        "effective": Objective(
            cost=consensus - interval.soft_worst(np.full(variance.size, strength)).reshape(variance.shape),
            trust=0,
        ),
    }
    if name not in found:
        raise ValueError(f"objective: expected one of {', '.join(found)}, got {name!r}")
    return found[name]


# --- how much weights must know ------------------------------------------------------------------------


def dose_response(
    worlds: Sequence[int] = WORLDS,
    target: float = TARGET,
    rhos: Sequence[float] = RHOS,
    prompts: int = PROMPTS,
    responses: int = RESPONSES,
    policies: int = POLICIES,
    stated: bool = False,
    linear: bool = False,
    disagreement: Disagreement = "none",
) -> pd.DataFrame:
    """Train policies at equal KL with weights of every correlation with the true variance.

    A row for each world, noise and weights: `weights` is `none` (vanilla), `correlated` with its `rho`, of
    which 0 is the placebo, or a placebo that keeps the variance's correlation with gold. `log_ratio` is
    ln of the placebo's Var / gain^2 over theirs, above 0 where they are the more robust. `rank_correlation`
    is with the variance, `gold_correlation` with gold within prompts. `linear` policies have one maximum at
    small targets only, as 0.1, and a world's `disagreement` decides how gold and variance are related.
    """
    rows: list[dict[str, float | int | str]] = []
    for seed in worlds:
        world = World(int(seed), disagreement)
        texts = stored_texts(world, prompts, responses)
        weights = list(_weights(texts, rhos, world.rng("weights")))
        for noise in get_args(Noise):
            bench = bench_of(texts, noise, world.rng("judges", noise), policies, linear)
            rows += _compared(bench, weights, target, stated, {"world": int(seed), "noise": noise})
    return pd.DataFrame(rows)


def world_table(seed: int, **sizes: Any) -> pd.DataFrame:
    """Return `dose_response` in one world, of free policies and of `linear` ones."""
    free = dose_response([seed], **sizes)
    linear = dose_response([seed], LINEAR_TARGET, LINEAR_RHOS, linear=True, **sizes)
    return pd.concat([free.assign(linear=False), linear.assign(linear=True)], ignore_index=True)


def worlds_table(
    study: Study, workers: int | str, from_results: bool = False, published: Path = RESULTS
) -> pd.DataFrame:
    """Return `dose_response` of free policies and of `linear` ones in all worlds, each kept in the run store;
    `from_results`, as published where it was published with these settings.
    """
    sizes = study.profile.bench.model_dump(mode="json")
    seeds = range(study.seed, study.seed + sizes.pop("worlds"))
    taken, path = seeds if from_results else seeds[:0], published / f"{PUBLISHED}.parquet"
    return of_worlds(study.store, "bench-world", world_table, sizes, seeds, workers, taken, path, (__name__,))


def of_worlds(
    store: RunStore,
    name: str,
    compute: Callable[..., pd.DataFrame],
    sizes: Mapping[str, Any],
    seeds: Sequence[int],
    workers: int | str,
    taken: Sequence[int],
    published: Path,
    code: Sequence[str],
) -> pd.DataFrame:
    """Return the rows compute(seed, **sizes) of all worlds: those of worlds that may be `taken` as published
    with the same sizes, the others computed, each kept in the run store. `origin` says which.
    """
    settings, known = content_key(**sizes), pd.DataFrame({"world": [], "settings": []})
    if len(taken) and published.is_file():
        known = pd.read_parquet(published)
    known = known[(known["settings"] == settings) & known["world"].isin(taken)]
    jobs = {
        seed: partial(_kept, store, name, compute, {"seed": seed, **sizes}, code)
        for seed in seeds
        if seed not in set(known["world"])
    }
    found = [known.assign(origin="published")] if len(known) else []
    if jobs:
        tables = run_jobs(jobs, workers, len(jobs), "worlds", store.root).values()
        found.insert(0, pd.concat(tables, ignore_index=True).assign(settings=settings, origin="computed"))
    return pd.concat(found, ignore_index=True)


def _kept(store: RunStore, *arguments: Any) -> pd.DataFrame:
    table = store.table(*arguments)
    report(1)
    return table


def _weights(
    texts: Texts, rhos: Sequence[float], random: np.random.Generator
) -> Iterator[tuple[str, float, Array]]:
    """Yield weights with their name and correlation, the placebo first."""
    features, variance = texts.varying, texts.variance
    field = placebo(variance, features, random, unrelated=[texts.gold])
    for rho in [0.0, *(rho for rho in rhos if rho)]:
        yield "correlated", rho, correlated(variance, field, rho)
    field = placebo(variance, features, random, kept=[texts.gold])
    yield KEEPING_GOLD, np.nan, correlated(variance, field, 0)
    yield "none", np.nan, np.ones_like(variance)


def _compared(
    bench: Bench,
    weights: Sequence[tuple[str, float, Array]],
    target: float,
    stated: bool,
    columns: dict[str, int | str],
) -> Iterator[dict[str, float | int | str]]:
    compared: Policies | None = None
    for name, rho, one in weights:
        trained = at_kl(bench, Objective(one, stated=stated), target)
        compared = compared or trained
        yield {
            **columns,
            "weights": name,
            "rho": rho,
            "rank_correlation": 0.0
            if name == "none"
            else float(spearmanr(one, bench.variance, axis=None)[0]),
            "gold_correlation": 0.0 if name == "none" else _within(one, bench.gold),
            **trained.row(),
            "log_ratio": trained.log_ratio(compared),
        }


def _within(first: Array, second: Array) -> float:
    """Return the correlation within prompts."""
    centred = [(one - one.mean(1, keepdims=True)).ravel() for one in (first, second)]
    return float(np.corrcoef(*centred)[0, 1])


def pooled(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over worlds of each noise and weights of `dose_response`, with Student's interval.

    `ratio`, with its ends, is of (gain / deviation)^2 to the placebo's.
    """
    rows = []
    for (noise, weights, rho), part in table.groupby(["noise", "weights", "rho"], dropna=False, sort=True):
        found = mean(part["log_ratio"])
        ends = {"ratio": found.value, "ratio_low": found.low, "ratio_high": found.high}
        rows.append(
            {"noise": noise, "weights": weights, "rho": rho, "worlds": len(part)}
            | {name: float(np.exp(end)) for name, end in ends.items()}
            | {
                name: float(part[name].mean())
                for name in ("signal", "gain", "deviation", "risk", "kl", "beta")
            }
        )
    return pd.DataFrame(rows)


def explained(table: pd.DataFrame) -> pd.DataFrame:
    """Return what makes the true variance's (gain / deviation)^2 another than vanilla's, by noise.

    In logarithms the parts add up to the `whole`: how `unequal` weights are (the placebo over vanilla), their
    correlation with `gold` (the placebo that keeps it over the other), and what they know of `errors` beyond.
    """
    rows = []
    for noise, part in table.groupby("noise", sort=True):
        wide = part.assign(rho=part["rho"].fillna(9)).pivot(
            index="world", columns=["weights", "rho"], values="log_ratio"
        )
        none, gold, true = wide["none", 9], wide[KEEPING_GOLD, 9], wide["correlated", 1]
        for name, values in {
            "whole": true - none, "unequal": -none, "gold": gold, "errors": true - gold
        }.items():  # fmt: skip
            rows.append({"noise": noise, "part": name, **mean(values).columns("log_ratio")})
    return pd.DataFrame(rows)
