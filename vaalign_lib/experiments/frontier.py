"""Notebook 08: which method is on the frontier, how good a variance must be, how to choose beta.

All on the feature bench (`theory.feature_bench`): N policies that are free to weigh P prompts' S stored
responses, each with rewards of its own, in worlds of their own. A case has the rewards and what their source
says of them; a row of a table is a stack of policies, trained at one KL and measured by gold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import rankdata

from vaalign_lib.data.world import language
from vaalign_lib.data.world.ratings import AttributeRaters
from vaalign_lib.data.world.world import ANNOTATORS, World
from vaalign_lib.experiments import feature_bench
from vaalign_lib.experiments.feature_bench import Texts, judge_errors, of_worlds, stored_texts
from vaalign_lib.policies.best_of_n import best_of_n_weights
from vaalign_lib.profiles import HeadTraining, Study
from vaalign_lib.rewards.attributes import reward_variance, total_variance, train_attributes
from vaalign_lib.rewards.base import Interval, Members
from vaalign_lib.rewards.last_layer import (
    bootstrap_heads,
    distilled_variance,
    dropout_variance,
    fit_heads,
    laplace_variance,
)
from vaalign_lib.rewards.simulated_judge import fourier_features
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.returns import RISK_MEASURES, risk_measures
from vaalign_lib.statistics.tests import rank_correlations
from vaalign_lib.store import RESULTS
from vaalign_lib.theory.feature_bench import Bench, Objective, Policies, at_kl, probabilities
from vaalign_lib.theory.variance_weights import correlated, noisy, placebo, power, prompt_only

NOISE = {"judges": 1.0, "unreliable judges": 8.0}  # error over what the annotators differ by
MODELS = "reward models"
PUBLISHED = "frontier_worlds"  # a table
DRAWN = (2, 4, 8)  # best of so many; the KLs that all methods are compared at are its own
MIDDLE = 4  # of them, at which variances are compared
STRENGTHS = {"uwo": 0.5, "reward-robust": 0.4, "effective": 2.0}  # see data/protocols/08.md
REPEATED = 16  # responses to a prompt whose preference pairs reward models learn from
WIDTH, SCALE, LENGTH_SCALE = 64, 3.0, 6.0  # of reward models' features; of their scores' prior
RATED = HeadTraining(  # URMs
    batch_size=64,
    learning_rate=3e-3,
    optimizer="adamw_torch",
    weight_decay=1e-2,
    scheduler="cosine",
    epochs=10,
)
LEAST = 0.01  # of the mean: a smaller variance counts as that


@dataclass(frozen=True)
class Case:
    """What N policies are trained on.

    Attributes:
        gold: (P, S).
        rewards: (N, P, S), of mean 0 within prompts and deviation 1 over all of a policy's.
        variance: (N, P, S), what their source says of them, of mean 1 (`rewards.base.Unit`).
        worst: (N, P, S), in the rewards' unit.
        soft_worst: (N, P, S), the certainty equivalent.
        unrelated: (P, S), a placebo's field.
        oracle: (P, S), the expected squared error.
        single: (N, P, S), rewards by one reward model without an ensemble.
        others: further variances (N, P, S) by name.
    """

    gold: Array
    rewards: Array
    variance: Array
    worst: Array
    soft_worst: Array
    unrelated: Array
    oracle: Array
    single: Array | None = None
    others: dict[str, Array] = field(default_factory=dict)

    @cached_property
    def squared_errors(self) -> Array:
        """What is left of a policy's rewards after their regression on gold within prompts, squared."""
        return squared_errors(self.rewards, self.gold)

    def objectives(self) -> dict[str, tuple[Array, Array | float, bool]]:
        """Return by method rewards, weights of the log ratio, and whether it is the stated objective."""
        mix, reward, variance = STRENGTHS["reward-robust"], self.rewards, self.variance
        found: dict[str, tuple[Array, Array | float, bool]] = {
            "vanilla": (reward, 1.0, False),
            "variance-aware": (reward, variance, False),
            "variance-aware, exact": (reward, variance, True),
            "uwo": (reward - STRENGTHS["uwo"] * variance, 1.0, False),
            "worst case": (self.worst, 1.0, False),
            "reward-robust": (mix * reward + (1 - mix) * self.worst, 1.0, False),
            "effective": (self.soft_worst, 1.0, False),
            "placebo": (reward, with_values_of_each(self.unrelated, variance), False),
        }
        if self.single is not None:
            found["single reward model"] = (self.single, 1.0, False)
        weighted = {f"{name}-weighted": self.others[name] for name in ("URM", "URME") if name in self.others}
        return found | {name: (reward, weights, False) for name, weights in weighted.items()}


def squared_errors(rewards: Array, gold: Array) -> Array:
    """Return squared residuals (N, P, S) of rewards regressed on gold (P, S), both from prompts' means."""
    centred, truth = (one - one.mean(-1, keepdims=True) for one in (rewards, gold))
    slope = (centred * truth).sum((1, 2), keepdims=True) / (truth**2).sum()
    return np.asarray((centred - slope * truth) ** 2)


def with_values_of_each(scores: Array, variance: Array) -> Array:
    """Return every policy's variances (N, P, S) in the order of the scores (P, S)."""
    ranks = rankdata(scores, method="ordinal") - 1
    ordered = np.sort(variance.reshape(len(variance), -1), axis=1)
    return ordered[:, ranks].reshape(variance.shape)


def mean_rank_correlation(weights: Array, squares: Array) -> float:
    """Return Spearman's correlation of weights, (P, S) or (N, P, S), and squared errors (N, P, S), a mean
    over policies.
    """
    flat = squares.reshape(len(squares), -1)
    with np.errstate(invalid="ignore"):  # 0 where all weights are the same
        found = rank_correlations(weights.reshape(-1, flat.shape[1]), flat)
    return float(np.nan_to_num(found).mean())


# --- cases ------------------------------------------------------------------------------------------


def case_of_judges(texts: Texts, noise: float, random: np.random.Generator, policies: int) -> Case:
    """Return policies with a persistent judge each, whose stated variance is right; `noise` times its errors.

    A policy hears its judge's own number, so pessimism is about that: half an interval's width below it,
    or the certainty equivalent of an interval around it.
    """
    rewards = texts.consensus + noise * judge_errors(texts, "persistent", random, policies)
    drawn = placebo(texts.variance, texts.varying, random, unrelated=[texts.gold])
    return case_of_intervals(texts.gold, rewards, texts.variance, drawn, noise)


def case_of_intervals(gold: Array, rewards: Array, variance: Array, drawn: Array, noise: float = 1.0) -> Case:
    """Return policies that hear rewards (N, P, S) of a stated variance (P, S), times `noise` squared: their
    pessimism is about an interval of that variance around what they hear.
    """
    half = noise * np.sqrt(3 * variance)
    scale = float((rewards - rewards.mean(-1, keepdims=True)).std())
    around = Interval(np.stack([-half, half], axis=-1).reshape(-1, 2))
    soft = around.soft_worst(np.full(half.size, STRENGTHS["effective"] / scale)).reshape(half.shape)
    of_each = np.broadcast_to(variance, rewards.shape)
    return _in_units(gold, rewards, of_each, rewards - half, rewards + soft, drawn, variance)


def _in_units(
    gold: Array,
    rewards: Array,
    variance: Array,
    worst: Array,
    soft: Array,
    drawn: Array,
    oracle: Array,
    **more: Any,
) -> Case:
    location = rewards.mean(-1, keepdims=True)
    scale = (rewards - location).std((1, 2), keepdims=True)
    said = [(one - location) / scale for one in (rewards, worst, soft)]
    return Case(gold, said[0], relative(variance), said[1], said[2], drawn, oracle, **more)


def relative(variance: Array) -> Array:
    """Return variances, (P, S) or (N, P, S), over their or their policy's mean, of at least `LEAST`."""
    return np.maximum(variance / variance.mean((-2, -1), keepdims=True), LEAST)


@dataclass(frozen=True)
class Labelled:
    """Texts of a world that reward models learn from: features (texts, 22), pairs (2, T) of their places,
    the chance (T, annotators) that each annotator prefers the first, and what people rate (texts, raters,
    attributes).
    """

    features: Array
    pairs: Array
    chances: Array
    ratings: Array


def labelled(world: World, pairs: int) -> Labelled:
    """Draw pairs of responses to one prompt, of mixed quality, and everybody's opinion of them."""
    random = world.rng("frontier", "labelled")
    prompts = world.prompts(max(4, pairs // REPEATED), random)
    asked = [prompt for prompt in prompts for _ in range(REPEATED)]
    answers = world.responses(asked, random.beta(2, 2, len(asked)), random)
    texts = [language.encode(some, language.RESPONSE_WORDS) for some in (asked, answers)]
    prompt, first = random.integers([len(prompts), REPEATED], size=(pairs, 2)).T
    second = (first + random.integers(1, REPEATED, pairs)) % REPEATED
    places = prompt * REPEATED + np.stack([first, second])
    utilities = world.utilities(*texts)
    gaps = utilities[places[0]] - utilities[places[1]]
    chances = expit(gaps / world.temperature(texts[0])[places[0], None])
    ratings = AttributeRaters(world).ratings(texts[0], texts[1], 1, random)
    return Labelled(world.features(*texts), places, chances, ratings)


@dataclass(frozen=True)
class Learned:
    """N reward models on features of one width, each fitted to its own pairs: features of the labelled texts
    (texts, d) and of the bench's, pairs' gaps (T, d), labels and counts (N, T), weights (N, d).
    """

    seen: Array
    features: Array
    gaps: Array
    wins: Array
    counts: Array
    weights: Array

    def members(self, count: int, random: np.random.Generator) -> Array:
        """Return the weights of so many bootstrapped heads of each model (N, count, d)."""
        return bootstrap_heads(self.gaps, self.wins, self.counts, count, random, self.weights)


def learned(
    source: Labelled, texts: Texts, policies: int, random: np.random.Generator, width: int = WIDTH
) -> Learned:
    """Fit reward models, each to half of the pairs, which annotators of its own label."""
    flat = np.concatenate([source.features, texts.features.reshape(-1, source.features.shape[1])])
    waves = SCALE * fourier_features(flat, random, LENGTH_SCALE, width // 2)
    seen, features = np.split(waves, [len(source.features)])
    who = random.integers(ANNOTATORS, size=(policies, len(source.chances)))
    chance = np.take_along_axis(source.chances.T, who, axis=0)
    wins = (random.random(who.shape) < chance).astype(float)
    counts = (random.random(who.shape).argsort(1) < who.shape[1] // 2).astype(float)
    gaps = seen[source.pairs[0]] - seen[source.pairs[1]]
    return Learned(seen, features, gaps, wins, counts, fit_heads(gaps, wins, counts))


def case_of_models(
    texts: Texts, source: Labelled, models: Learned, heads: Array, random: np.random.Generator
) -> Case:
    """Return policies with an ensemble each, the mean of whose heads (N, members, d) is their reward."""
    shape = len(heads), *texts.gold.shape
    scores = heads @ models.features.T  # (N, members, P S)
    rewards, worst = scores.mean(1).reshape(shape), scores.min(1).reshape(shape)
    scale = float((rewards - rewards.mean(-1, keepdims=True)).std())
    flat = Members(scores.swapaxes(1, 2).reshape(-1, scores.shape[1]))
    soft = flat.soft_worst(np.full(rewards.size, STRENGTHS["effective"] / scale)).reshape(shape)
    oracle = squared_errors(rewards, texts.gold).mean(0)
    drawn = placebo(oracle, texts.varying, random, unrelated=[texts.gold])
    alone = (models.weights @ models.features.T).reshape(shape)
    alone = alone - alone.mean(-1, keepdims=True)
    alone = alone / alone.std((1, 2), keepdims=True)
    others = {
        name: relative(one.reshape(shape)) for name, one in _by_ratings(source, models, shape[0], random)
    }
    variance = scores.var(1, ddof=1).reshape(shape)
    return _in_units(texts.gold, rewards, variance, worst, soft, drawn, oracle, single=alone, others=others)


def _by_ratings(
    source: Labelled, models: Learned, policies: int, random: np.random.Generator, members: int = 3
) -> Iterator[tuple[str, Array]]:
    """Yield the variances (N, texts) of URMs fitted to people's ratings: what people differ by, summed over
    attributes as the paper filters by, and what members of an ensemble differ by (URME).
    """
    rows = torch.as_tensor(random.permuted(np.tile(np.arange(len(source.ratings)), (policies, 1)), axis=1))
    rows = rows[:, : rows.shape[1] // 2].repeat_interleave(members, 0)  # every policy's own half of the texts
    seen, features, ratings = (
        torch.as_tensor(one, dtype=torch.float32) for one in (models.seen, models.features, source.ratings)
    )
    seed = int(random.integers(2**31))
    heads = train_attributes(seen, ratings, rows, loss="mle", settings=RATED, seed=seed)
    told = heads.ratings(features)
    even = torch.ones(ratings.shape[-1])
    variances = reward_variance(told, even, "plain").unflatten(0, (policies, members))
    yield "URM", variances[:, 0].double().numpy()
    means = told.means.mean(-1).unflatten(0, (policies, members))
    parts = [total_variance(*pair)[1] for pair in zip(means, variances, strict=True)]
    yield "URME", torch.stack(parts).double().numpy()


# --- stacks -----------------------------------------------------------------------------------------


def bench_of_rewards(gold: Array, rewards: Array) -> Bench:
    """Return a bench of policies that are free to weigh every response, with rewards (N, P, S)."""
    return Bench(None, gold, np.zeros_like(gold), np.ones_like(gold), rewards)


def trained(
    gold: Array,
    rewards: Array,
    weights: Array | float,
    stated: bool,
    target: float,
    start: Policies | None = None,
) -> Policies | None:
    """Return policies at a mean KL, or nothing where no coefficient leaves it."""
    try:
        return at_kl(bench_of_rewards(gold, rewards), Objective(weights, stated=stated), target, start)
    except ValueError as error:
        if "no coefficient" not in str(error):
            raise
        return None


def best_kl(responses: int, n: int) -> float:
    """Return the KL of the best of n, drawn without replacement from the stored responses."""
    weights = best_of_n_weights(responses, n)
    return float(sum(w * np.log(w * responses) for w in weights if w > 0))


def best_of_n_gains(case: Case, n: int) -> Array:
    """Return each policy's expected gain (N,) when its rewards choose the best of n."""
    order = np.argsort(case.rewards, axis=-1)
    ranked = np.take_along_axis(np.broadcast_to(case.gold, order.shape), order, axis=-1)
    return np.asarray((ranked @ best_of_n_weights(order.shape[-1], n)).mean(1) - case.gold.mean())


def filtered(case: Case, target: float, start: Policies) -> Policies | None:
    """Return vanilla policies that leave out each prompt's most uncertain responses, for half of the KL."""
    left_out = round(case.gold.shape[1] * -np.expm1(-target / 2))
    ranks = case.variance.argsort(-1).argsort(-1)
    rewards = case.rewards - 1e4 * (ranks >= case.gold.shape[1] - left_out)
    return trained(case.gold, rewards, 1.0, False, target, start)


_CVAR = RISK_MEASURES.index("cvar_10")


def measured(gains: Array, best: float) -> dict[str, float]:
    """Return what is told of a stack's gains in gold (N,); regret is the worst policy's, against the `best`
    gain that any policy has at this KL.
    """
    tail = risk_measures(gains, np.zeros(1))[_CVAR]
    gain, deviation = float(gains.mean()), float(gains.std(ddof=1))
    told = {"gain": gain, "deviation": deviation, "risk": float((gains < 0).mean()), "cvar_10": float(tail)}
    return told | {"regret": best - float(gains.min()), "signal": (gain / deviation) ** 2}


def best_gain(gold: Array, target: float) -> float:
    """Return the gain of the policy that knows gold, at this KL."""
    return at_kl(bench_of_rewards(gold, gold[None]), Objective(), target).gain


def frontier(case: Case, part: str = "frontier", drawn: Sequence[int] = DRAWN) -> Iterator[dict[str, Any]]:
    """Yield a row for every method and KL."""
    for n in drawn:
        target = best_kl(case.gold.shape[1], n)
        best = best_gain(case.gold, target)
        stacks: dict[str, Policies | None] = {}
        for method, (rewards, weights, stated) in case.objectives().items():
            stacks[method] = trained(case.gold, rewards, weights, stated, target)
        vanilla = stacks["vanilla"]
        assert vanilla is not None
        stacks["filtering"] = filtered(case, target, vanilla)
        for method, stack in stacks.items():
            if stack is not None:
                row = {"part": part, "method": method, "n": n, "kl": float(stack.kl.mean())}
                yield row | {"beta": float(stack.beta[0])} | measured(stack.gains, best)
        row = {"part": part, "method": "best of n", "n": n, "kl": target}
        yield row | measured(best_of_n_gains(case, n), best)


# --- how good a variance must be --------------------------------------------------------------------

RHOS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0)


def doses(
    case: Case, features: Array, category: NDArray[np.int64], random: np.random.Generator
) -> Iterator[tuple[str, float, Array]]:
    """Yield weights by family and dose: with the oracle's values and a chosen correlation with it, or the
    oracle spoiled in other ways. `category` (P,) is a number for each prompt's.
    """
    for rho in RHOS:
        yield "correlated", rho, correlated(case.oracle, case.unrelated, rho)
    kept = placebo(case.oracle, features, random, kept=[case.gold])
    yield "placebo that keeps gold", 0.0, correlated(case.oracle, kept, 0)
    for gamma in (0.25, 0.5, 1.5, 2.0):
        yield "power", gamma, power(case.oracle, gamma)
    for factor in (2.0, 4.0, 8.0):
        yield "noisy by a factor", factor, noisy(case.oracle, float(np.log(factor)), random)
    yield "heavy tails", 1.0, case.oracle * (1 + random.pareto(1.0, case.oracle.shape))
    for factor in (0.25, 4.0):
        bias = np.where(category == language.CATEGORIES.index("safety"), factor, 1.0)
        yield "bias in one category", factor, case.oracle * bias[:, None]
    yield "prompt only", 0.0, np.array(prompt_only(case.oracle))


def dose_rows(case: Case, weights: Sequence[tuple[str, float, Array]], part: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each weights: what they know of squared errors, and ln of their (gain / SD)^2 over
    vanilla's at equal KL, `log_ratio`.
    """
    target = best_kl(case.gold.shape[1], MIDDLE)
    best = best_gain(case.gold, target)
    vanilla = trained(case.gold, case.rewards, 1.0, False, target)
    assert vanilla is not None
    for method, dose, one in weights:
        least = relative(one)
        stack = trained(case.gold, case.rewards, least, False, target)
        if stack is not None:
            row = {"part": part, "method": method, "dose": dose, "kl": float(stack.kl.mean())}
            row |= {"correlation": mean_rank_correlation(least, case.squared_errors)}
            row |= {"log_ratio": stack.log_ratio(vanilla), "more_gain": stack.gain - vanilla.gain}
            yield row | measured(stack.gains, best)


def sources(
    texts: Texts, models: Learned, heads: Array, many: Array, case: Case
) -> Iterator[tuple[str, float, Array]]:
    """Yield what is known of reward models' errors, by source, with the heads evaluated at each text."""
    shape = case.rewards.shape

    def spread(members: Array) -> Array:
        return np.asarray((members @ models.features.T).var(1, ddof=1)).reshape(shape)

    own = [one @ models.seen.T for one in heads]
    seen = np.stack([np.maximum(one.var(0, ddof=1), 1e-9) for one in own])
    yield "2 heads", 2, spread(heads[:, :2])
    yield f"{heads.shape[1]} heads", heads.shape[1], spread(heads)
    yield f"{many.shape[1]} heads", many.shape[1], spread(many)
    last_layer = laplace_variance(models.features, models.gaps, models.weights, models.counts)
    yield "last-layer Laplace", 1, last_layer.reshape(shape)
    yield "distilled head", 1, distilled_variance(models.features, models.seen, seen).reshape(shape)
    yield "dropout", 1, dropout_variance(models.features, models.weights).reshape(shape)
    yield "URM", 1, case.others["URM"]
    yield "URME", 3, case.others["URME"]
    yield "annotators' true variance", np.nan, texts.variance
    yield "oracle", np.nan, case.oracle


# --- choosing beta ----------------------------------------------------------------------------------

KLS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.2)  # of the path that beta is chosen on
BUDGET, RISK = 0.6, 0.05  # of matched KL and adaptive; of target risk
VALIDATED = 4  # one part in so many of the prompts is for validation,
EACH = 16  # with so many gold labels to a prompt


def beta_rows(case: Case, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Yield a row for every method and way to choose beta: what its policies gain on the prompts that are not
    for validation, and the regret of gain and CVaR against the best coefficient of the path in hindsight.
    """
    cut = max(1, len(case.gold) // VALIDATED)
    held, rest = slice(0, cut), slice(cut, None)
    others = len(case.rewards) - 1
    agreed = (case.rewards.sum(0) - case.rewards) / others  # what the other judges or models say (N, P, S)
    for method in ("vanilla", "variance-aware"):
        rewards, weights, stated = case.objectives()[method]
        path: list[Policies] = []
        for kl in KLS:
            found = trained(case.gold, rewards, weights, stated, kl, path[-1] if path else None)
            if found is not None:
                path.append(found)
        chances = np.stack([probabilities(one, rewards, weights) for one in path])  # (betas, N, P, S)
        count = chances.shape[-1]
        tested, validated = (gained(chances[:, :, one], case.gold[one]) for one in (rest, held))
        agreement = gained(chances[:, :, rest], agreed[:, rest])
        noise = case.gold.std() / np.sqrt(cut * EACH) * random.standard_normal(tested.shape)
        kl = (chances * np.log(np.maximum(chances * count, 1e-300))).sum(-1).mean(-1)
        means, tails = tested.mean(1), risk_measures(tested, np.zeros((len(path), 1)))[_CVAR]
        for how, gains, cost in _chosen(tested, validated + noise, agreement, kl, cut * EACH * len(path)):
            told = measured(gains, np.nan) | {"labels": cost}
            told |= {"regret_gain": means.max() - told["gain"], "regret_cvar": tails.max() - told["cvar_10"]}
            yield {"part": "beta", "method": method, "choice": how} | told


def gained(chances: Array, gold: Array) -> Array:
    """Return the mean over prompts of expected gold (..., S) less the reference's, (..., N)."""
    return np.asarray((chances * (gold - gold.mean(-1, keepdims=True))).sum(-1).mean(-1))


def _chosen(
    tested: Array, validated: Array, agreement: Array, kl: Array, labels: int
) -> Iterator[tuple[str, Array, int]]:
    """Yield each way to choose with its policies' gains (N,), from paths (betas, N), and the gold labels that
    it takes.
    """
    own = np.arange(tested.shape[1])
    yield "matched KL", tested[np.abs(np.log(kl.mean(1) / BUDGET)).argmin()], 0
    yield "adaptive", tested[np.abs(np.log(kl / BUDGET)).argmin(0), own], 0
    yield "validation", tested[validated.argmax(0), own], labels
    yield "validation, all policies", tested[validated.mean(1).argmax()], labels * len(own)
    safe = np.flatnonzero((agreement < 0).mean(1) <= RISK)
    yield "target risk", tested[safe.max() if safe.size else 0], 0


# --- other tasks ------------------------------------------------------------------------------------

LOSS, SHARE = 8.0, 0.02  # of an unsafe response in standard deviations of gold, and how many are
TASK_METHODS = ("vanilla", "variance-aware", "uwo", "worst case", "reward-robust", "effective", "placebo")


def task_rows(
    texts: Texts, noise: float, random: np.random.Generator, policies: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for every task and method at the middle KL.

    `two attributes`: correctness and coherence have a judge each for every policy, whose mean is the reward;
    a policy counts by the attribute that it gains less in. `disputed`, `undisputed`: responses with a heavy
    loss that no judge sees are among those with the highest variance, or anywhere; `unsafe` is their share
    over the reference's.
    """
    target = best_kl(texts.gold.shape[1], MIDDLE)
    first, second = texts.features[..., 1], texts.features[..., 2]
    other = correlated(texts.variance, placebo(texts.variance, texts.varying, random), 0)
    pair = [
        case_of_judges(replace(texts, gold=one, consensus=one, variance=variance), noise, random, policies)
        for one, variance in ((first, texts.variance), (second, other))
    ]
    both = replace(
        pair[0], **{name: (getattr(pair[0], name) + getattr(pair[1], name)) / 2 for name in _AVERAGED}
    )
    yield from _task("two attributes", both, [first, second], target)
    case = case_of_judges(texts, noise, random, policies)
    rare = {
        "disputed": texts.variance * random.random(texts.gold.shape) ** 0.5,
        "undisputed": random.random(texts.gold.shape),
    }
    for task, scores in rare.items():
        unsafe = (scores >= np.quantile(scores, 1 - SHARE)).astype(float)
        yield from _task(
            task, replace(case, gold=texts.gold - LOSS * unsafe), [texts.gold - LOSS * unsafe], target, unsafe
        )


_AVERAGED = ("gold", "rewards", "variance", "worst", "soft_worst")


def _task(
    task: str, case: Case, golds: Sequence[Array], target: float, unsafe: Array | None = None
) -> Iterator[dict[str, Any]]:
    for method in TASK_METHODS:
        rewards, weights, stated = case.objectives()[method]
        stack = trained(case.gold, rewards, weights, stated, target)
        if stack is not None:
            chances = probabilities(stack, rewards, weights)
            by = [gained(chances, one) for one in golds]
            row = {"part": "task", "task": task, "method": method} | measured(np.min(by, axis=0), np.nan)
            if unsafe is not None:
                row["unsafe"] = 1 + float(gained(chances, unsafe).mean() / unsafe.mean())
            yield row


# --- worlds -----------------------------------------------------------------------------------------


def world_table(
    seed: int,
    prompts: int,
    responses: int,
    policies: int,
    pairs: int,
    members: int,
    many: int,
    widths: Sequence[int],
) -> pd.DataFrame:
    """Return all rows of one world."""
    world = World(seed)
    texts = stored_texts(world, prompts, responses)
    category = np.arange(prompts, dtype=np.int64) % len(language.CATEGORIES)  # as `World.prompts` draws them
    rows: list[dict[str, Any]] = []

    def add(bench: str, found: Iterator[dict[str, Any]]) -> None:
        rows.extend({"world": seed, "bench": bench} | row for row in found)

    for bench, noise in NOISE.items():
        random = partial(world.rng, "frontier", bench)
        case = case_of_judges(texts, noise, random("case"), policies)
        add(bench, frontier(case))
        add(bench, dose_rows(case, list(doses(case, texts.varying, category, random("doses"))), "dose"))
        add(bench, beta_rows(case, random("beta")))
        add(bench, task_rows(texts, noise, random("tasks"), policies))
    source = labelled(world, pairs)
    for width in dict.fromkeys((WIDTH, *widths)):
        random = partial(world.rng, "frontier", MODELS, width)
        models = learned(source, texts, policies, random("models"), width)
        heads = models.members(members, random("heads"))
        case = case_of_models(texts, source, models, heads, random("case"))
        if width == WIDTH:
            add(MODELS, frontier(case))
            add(MODELS, dose_rows(case, list(doses(case, texts.varying, category, random("doses"))), "dose"))
            add(MODELS, beta_rows(case, random("beta")))
            hundred = models.members(many, random("many"))
            add(MODELS, dose_rows(case, list(sources(texts, models, heads, hundred, case)), "source"))
        add(MODELS, (row | {"width": width} for row in frontier(case, "width", (MIDDLE,))))
    return pd.DataFrame(rows)


def worlds_table(study: Study, workers: int | str, published: Path = RESULTS) -> pd.DataFrame:
    """Return the rows of all worlds: so many computed, each kept in the run store, the rest as published.

    What was published with other settings, or not at all, is computed. `origin` says which.
    """
    sizes = study.profile.frontier.model_dump(mode="json")
    seeds = range(study.seed, study.seed + sizes.pop("worlds"))
    taken, path = seeds[sizes.pop("computed") :], published / f"{PUBLISHED}.parquet"
    code = __name__, feature_bench.__name__
    return of_worlds(study.store, "frontier-world", world_table, sizes, seeds, workers, taken, path, code)
