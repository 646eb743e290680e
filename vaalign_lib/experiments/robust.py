"""The experiment of notebook 07 but for its policies: the toy, Gaussian heads, the bench, annotators.

It is made in the embedded world whatever the profile. Shapes: E ensembles, H heads, R responses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vaalign_lib.data.pairs import EMBEDDED, DataError
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.feature_bench import TARGET, judge_errors, stored_texts
from vaalign_lib.experiments.references import reference
from vaalign_lib.experiments.reward_models import RewardStudy, prepare
from vaalign_lib.profiles import Profile, Study, load_profile
from vaalign_lib.rewards.heads import train_heads
from vaalign_lib.rewards.robust import HEADS, GaussianHeads, Loss, mse_loss, nominal, train_gaussian_heads
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, mean, percentiles, rank_correlations
from vaalign_lib.store import content_key
from vaalign_lib.theory import toy
from vaalign_lib.theory.feature_bench import Bench, Objective, at_kl
from vaalign_lib.theory.robust import Rule, worst_return_policy

ARCHITECTURE = "gpt2"
LAMBDAS: tuple[Rule, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TOY_RULES: tuple[Rule, ...] = (*LAMBDAS, "mean", "max", "returns")
TOY_NAMES = {1.0: "standard", 0.4: "robust", "mean": "mean of the same four", "max": "maximum"}
SWEEP: dict[str, toy.Settings] = {
    "as taken": toy.Settings(),
    "8 units": toy.Settings(hidden=8),
    "32 units": toy.Settings(hidden=32),
    "rewards, 50 steps": toy.Settings(reward_steps=50),
    "rewards, 800 steps": toy.Settings(reward_steps=800),
    "policies, 50 steps": toy.Settings(policy_steps=50),
    "policies, 800 steps": toy.Settings(policy_steps=800),
    "own pairs for each model": toy.Settings(own_pairs=True),
    "rewards from prompts' means": toy.Settings(centred=True),
    "PPO on sampled responses": toy.Settings(sampled=True),
}
TIE = 0.5  # in the temperature of a prompt's labels: utilities nearer than that are said to be the same


def in_the_world(profile: Profile) -> Profile:
    """Return a profile whose policies are tiny ones and whose pairs are those of the embedded world."""
    tiny = profile.reference.models[ARCHITECTURE] == "tiny" and profile.policies.data == EMBEDDED
    if tiny and profile.reward_data.pairs == EMBEDDED and profile.reward_model.backbone == "tiny-gemma":
        return profile
    return load_profile("embedded").model_copy(update={"robust": profile.robust})


# --- the toy --------------------------------------------------------------------------------------------


def toy_outcomes(policies: Mapping[Rule, Array]) -> pd.DataFrame:
    """Return, for every rule and seed, the share of prompts found, whether all are (`whole`), and the mean
    probability of the right response.
    """
    tables = []
    for rule, policy in policies.items():
        right = toy.right_ones(policy)  # (S, K)
        diagonal = np.einsum("skk->s", policy) / toy.SIZE
        columns = {"prompts": right.mean(1), "whole": right.all(1), "probability": diagonal}
        tables.append(pd.DataFrame({"rule": str(rule), "seed": np.arange(len(policy)), **columns}))
    return pd.concat(tables, ignore_index=True)


def toy_contrast(outcomes: pd.DataFrame, first: Rule, second: Rule, column: str = "prompts") -> Estimate:
    """Return the mean over seeds of one rule's outcome minus another's."""
    wide = outcomes.astype({column: float}).pivot(index="seed", columns="rule", values=column)
    return mean(wide[str(first)] - wide[str(second)])


def toy_sweep(seeds: int, seed: int, settings: Mapping[str, toy.Settings] = SWEEP) -> pd.DataFrame:
    """Play the toy in every setting: shares of prompts found by standard, robust, and mean of the same four,
    and the contrasts robust minus mean and minus standard with their intervals.
    """
    rows = []
    for name, one in settings.items():
        models = toy.reward_models(seeds, one, seed)
        found = toy_outcomes(toy.play(models, (1.0, 0.4, "mean"), one, seed))
        shares = found.groupby("rule")["prompts"].mean()
        row = {"setting": name, **{TOY_NAMES[k]: shares[str(k)] for k in (1.0, 0.4, "mean")}}
        row |= toy_contrast(found, 0.4, "mean").columns("over_mean")
        rows.append(row | toy_contrast(found, 0.4, 1.0).columns("over_standard"))
    return pd.DataFrame(rows)


# --- Gaussian heads -------------------------------------------------------------------------------------


def reward_study(study: Study) -> RewardStudy:
    """Return the embedded pairs and the reward model of stage 1."""
    return prepare(study, reference=reference(study, ARCHITECTURE))


def gaussian_heads(
    study: RewardStudy, ensembles: int, loss: Loss = mse_loss, repeat: int = 0
) -> GaussianHeads:
    """Train ensembles by stage 2 on what the reward model of stage 1 says of its own training pairs."""
    features = study.features("train")
    preferred = torch.sigmoid(features["chosen_score"] - features["rejected_score"])
    settings = study.profile.ensembles.trained
    return train_gaussian_heads(
        features["chosen"],
        features["rejected"],
        preferred,
        settings=settings,
        seed=study.seed + 1_000_003 * repeat,
        ensembles=ensembles,
        loss=loss,
    )


def traditional(study: RewardStudy, seeds: int) -> tuple[Array, Array]:
    """Train one Bradley-Terry head a seed on all pairs and the same features; return the rewards of the
    evaluation pairs' chosen and rejected responses (E, pairs).
    """
    train, pairs = study.features("train"), study.features("evaluation")
    heads, _ = train_heads(
        train["chosen"],
        train["rejected"],
        kind="order",
        settings=study.profile.ensembles.trained,
        seed=study.seed,
        members=seeds,
        description="traditional heads",
    )
    first, second = (heads.scores(pairs[side])[0].double().numpy() for side in ("chosen", "rejected"))
    return first, second


Sides = tuple[Array, Array]  # of chosen and rejected responses


def by_model(heads: GaussianHeads, features: Mapping[str, Tensor]) -> dict[str, Sides]:
    """Return the rewards of pairs by each way to use an ensemble, (E, pairs) each, and of all heads."""
    found: dict[str, list[Array]] = {}
    for side in ("chosen", "rejected"):
        means, deviations = (one.double().numpy() for one in heads(features[side]))  # (E, H, pairs)
        for name, rewards in {
            "nominal": nominal(means, deviations, 1), "mean of heads": means.mean(1), "heads": means,
            "lowest": means.min(1), "deviations": deviations,
        }.items():  # fmt: skip
            found.setdefault(name, []).append(rewards)
    return {name: (one[0], one[1]) for name, one in found.items()}


def accuracies(models: Mapping[str, Sides], categories: Sequence[str]) -> pd.DataFrame:
    """Return every seed's accuracy on the labels: `model`, `category` (or all), `seed`, `accuracy`.

    Of the `heads` it is that of one at random, the mean over them.
    """
    rows, labels = [], np.asarray(categories)
    groups = {"all": np.full(len(labels), True)} | {one: labels == one for one in dict.fromkeys(categories)}
    for model, (chosen, rejected) in models.items():
        right = chosen > rejected
        right = right.mean(1) if right.ndim == 3 else right  # (E, pairs)
        for name, chosen_ones in groups.items():
            shares = right[:, chosen_ones].mean(1)
            table = {"model": model, "category": name, "seed": np.arange(len(shares)), "accuracy": shares}
            rows.append(pd.DataFrame(table))
    return pd.concat(rows, ignore_index=True)


def paired(table: pd.DataFrame, first: str, second: str, category: str = "all") -> Estimate:
    """Return the mean over seeds of one model's accuracy minus another's."""
    wide = table[table["category"] == category].pivot(index="seed", columns="model", values="accuracy")
    return mean(wide[first] - wide[second])


def ellipse(sides: Sides) -> Array:
    """Return the area of the ellipse of chosen and rejected rewards (E,), all standardized together."""
    pooled = np.concatenate(sides, 1).std(1)
    chosen, rejected = (one - one.mean(1, keepdims=True) for one in sides)
    covariance = (chosen * rejected).mean(1)
    determinant = chosen.var(1) * rejected.var(1) - covariance**2
    return np.asarray(np.pi * np.sqrt(determinant) / pooled**2)


def margins(sides: Sides) -> Array:
    """Return chosen minus rejected rewards (E, pairs) in deviations of all rewards of a model."""
    return np.asarray((sides[0] - sides[1]) / np.concatenate(sides, 1).std(1, keepdims=True))


def gaps(models: Mapping[str, Sides], gold: Array) -> dict[str, Array]:
    """Return rewards minus gold of all responses, both standardized, by `heads` (E, H, R) and by the `lowest`
    of the standardized heads (E, R).
    """
    heads = np.concatenate(models["heads"], 2)
    heads = (heads - heads.mean(2, keepdims=True)) / heads.std(2, keepdims=True)
    truth = (gold - gold.mean()) / gold.std()
    return {"heads": heads - truth, "lowest": heads.min(1) - truth, "gold": truth}


def confidence(models: Mapping[str, Sides], errors: Array) -> Array:
    """Return the rank correlation over responses of a head's deviation and its absolute error (E, H, R), the
    mean over an ensemble's heads (E,).
    """
    deviations = np.concatenate(models["deviations"], 2)
    return np.asarray(rank_correlations(deviations, np.abs(errors)).mean(1))


# --- the feature bench ----------------------------------------------------------------------------------


def bench(
    worlds: Sequence[int], prompts: int, responses: int, policies: int, members: int = HEADS
) -> pd.DataFrame:
    """Train policies by every method at equal KL, each on five persistent judges of its own.

    A row for each world and method: outcome of `theory.feature_bench.Policies.row`. The first judge is
    nominal. `returns` is Equation 6 as it is written, alone and in Equation 7; the variance-aware policies
    take the judges' mean, weighted by their variance, which is known here.
    """
    rows = []
    for world in worlds:
        rows += list(_of_world(World(int(world)), prompts, responses, policies, members))
    return pd.DataFrame(rows)


def _of_world(
    world: World, prompts: int, responses: int, policies: int, members: int
) -> Iterator[dict[str, Any]]:
    texts = stored_texts(world, prompts, responses)
    errors = judge_errors(texts, "persistent", world.rng("five judges"), policies * members)
    rewards = texts.consensus + errors.reshape(policies, members, prompts, responses)
    first, lowest, average = rewards[:, 0], rewards.min(1), rewards.mean(1)
    plain = {
        "nominal": first, "mean": average, "lowest": lowest, "max": rewards.max(1),
        "robust, 0.6": 0.6 * first + 0.4 * lowest,
    }  # fmt: skip
    base = Bench(None, texts.gold, texts.consensus, texts.variance, errors[:policies])

    def trained(reward: Array, weights: Array | float = 1.0) -> Any:
        own = replace(base, errors=reward - texts.consensus)
        return at_kl(own, Objective(weights=weights), TARGET)

    found = {name: trained(reward) for name, reward in plain.items()}
    found["variance-aware"] = trained(average, texts.variance)
    for name, weight in (("returns", 0.0), ("returns, 0.6", 0.6)):
        policy = found["lowest" if weight == 0 else "robust, 0.6"]
        for _ in range(3):  # the mixture depends on the coefficient, and that on the mixture
            best = worst_return_policy(first, rewards, weight, policy.beta)
            mixed = weight * first + (1 - weight) * np.einsum("nm,nmps->nps", best.weights, rewards)
            policy = trained(mixed)
        found[name] = policy
    for name, policy in found.items():
        yield {"world": world.seed, "method": name, **policy.row()}


def bench_contrast(table: pd.DataFrame, first: str, second: str, column: str = "gain") -> Estimate:
    """Return the mean over worlds of one method's outcome minus another's; of `signal` its logarithm."""
    wide = table.pivot(index="world", columns="method", values=column)
    wide = np.log(wide) if column == "signal" else wide
    return mean(wide[first] - wide[second])


# --- annotators -----------------------------------------------------------------------------------------


def agreement(labels: Array, seed: int = 0, resamples: int = 2000) -> dict[str, Estimate]:
    """Return how often two people agree on a pair, of labels (pairs, people): 1, 0 (the same) or -1.

    `consistent` and `opposite` are of all ordered pairs of people, `consistent_gb` and `opposite_gb` of those
    whose first says 1 or -1; intervals are over pairs of responses, drawn again.
    """
    people = labels.shape[1]
    first, second = (labels[:, one] for one in np.nonzero(~np.eye(people, dtype=bool)))
    firm = first != 0
    counts = {
        "consistent": (first == second, np.ones_like(firm)),
        "opposite": (first * second < 0, np.ones_like(firm)),
        "consistent_gb": ((first == second) & firm, firm),
        "opposite_gb": (first * second < 0, firm),
    }
    drawn = np.random.default_rng(seed).multinomial(
        len(labels), np.full(len(labels), 1 / len(labels)), resamples
    )
    found = {}
    for name, (events, base) in counts.items():
        events, base = events.sum(1), base.sum(1)
        with np.errstate(invalid="ignore"):
            shares = (drawn @ events) / (drawn @ base)
        found[name] = percentiles(events.sum() / base.sum(), shares, len(labels))
    return found


def labels_of_world(study: RewardStudy, people: int = 2) -> Array:
    """Let random annotators of the embedded world judge its evaluation pairs (pairs, people): each by utility
    and Bradley-Terry noise, and the same where they are nearer than `TIE` temperatures.
    """
    pairs, world = study.part("evaluation"), World(study.seed)
    random, rows = world.rng("agreement"), np.arange(len(pairs))[:, None]
    asked = pairs["prompt"].tolist()
    utilities = [world.utilities(asked, pairs[side].tolist()) for side in ("chosen", "rejected")]
    who = random.permuted(np.tile(np.arange(utilities[0].shape[1]), (len(pairs), 1)), axis=1)[:, :people]
    gap = (utilities[0] - utilities[1])[rows, who] / world.temperature(asked)[:, None]
    gap += random.logistic(size=gap.shape)
    return np.asarray(np.sign(gap) * (np.abs(gap) > TIE))


def labels_of_file(path: str | Path) -> Array:
    """Read what several people said of pairs, lines of JSON whose `ratings` are 0 (the same), 1 (the first is
    better) or 2; people are as many as the first line has.
    """
    try:
        ratings = pd.read_json(path, lines=True)["ratings"].map(np.asarray).tolist()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: expected lines of JSON with `ratings`: {error}") from None
    same = [one for one in ratings if len(one) == len(ratings[0])]
    labels = np.stack(same)
    if not np.isin(labels, (0, 1, 2)).all():
        raise DataError(f"{path}: ratings: expected 0, 1 or 2 for every pair")
    return np.where(labels == 2, -1.0, labels)


def key_of(study: Study) -> str:
    """Return the key of the settings that policies of notebook 07 are trained with."""
    sections = {"reward_data", "reference", "reward_model", "ensembles", "policies"}
    settings = study.profile.model_dump(include=sections)
    for name in ("runs", "judges", "matching", "count"):
        del settings["policies"][name]
    sizes = study.profile.robust.model_dump(include={"ensembles", "steps", "repeats"})
    return content_key(settings=settings, sizes=sizes, seed=study.seed)
