"""The experiment of notebook 06: URMs and URMEs on one frozen backbone, and what their variances know.

Everything is computed for all seeds at once. Shapes: S seeds, M members of a URME, N texts, K attributes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from vaalign_lib.data.world.attributes import ATTRIBUTES
from vaalign_lib.data.world.ratings import AttributeRaters
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.feature_bench import stored_texts
from vaalign_lib.experiments.people import bench
from vaalign_lib.experiments.reward_models import RewardStudy
from vaalign_lib.models import conversation_ids
from vaalign_lib.policies.best_of_n import best_of_n, best_of_n_kl
from vaalign_lib.policies.reference_pairs import sample_reference
from vaalign_lib.profiles import AttributeStudy, HeadTraining, Study
from vaalign_lib.rewards.attributes import (
    AttributeHeads,
    Gating,
    Loss,
    largest_covariance,
    largest_gap,
    reward,
    reward_variance,
    total_variance,
    train_attribute_backbones,
    train_attributes,
    train_gating,
)
from vaalign_lib.rewards.classifier import load_reward_model
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, mean, rank_correlations
from vaalign_lib.store import RESULTS
from vaalign_lib.theory.feature_bench import Bench, Objective, at_kl
from vaalign_lib.theory.variance_weights import normal_scores, placebo, with_values_of

# of the five attributes, as users of Nemotron-4-340B-Reward are told by its model card
PRIOR = torch.tensor([0.3, 0.74, 0.46, 0.47, -0.33])
KEPT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
NS = (1, 2, 4, 8, 16, 32, 64)
LOSS_OF: dict[str, Loss] = {  # of every kind of value head
    "mle": "mle",
    "bootstrap": "mle",
    "regression": "regression",
    "deterministic": "deterministic",
}


@dataclass(frozen=True)
class Texts:
    """Texts as heads see them (N, d), and the moments of what raters say (N, K each)."""

    prompts: list[str]
    responses: list[str]
    features: Tensor
    means: Array
    variances: Array

    @property
    def seen(self) -> "Seen":
        return self.features, words_of(self.responses)


Seen = tuple[Tensor, Array]  # texts without ratings: features (N, d), and numbers of words (N,)


def words_of(texts: Iterable[str]) -> Array:
    """Return how many words texts have (N,)."""
    return np.array([len(text.split()) for text in texts], dtype=float)


def read_texts(study: RewardStudy, world: World, prompts: list[str], responses: list[str]) -> Texts:
    """Run the frozen backbone over texts of a world and look up what its raters say on average."""
    features, _ = study.read(prompts, responses)
    return Texts(prompts, responses, features, *AttributeRaters(world).moments(prompts, responses))


def rated_texts(study: RewardStudy) -> tuple[Texts, Tensor, Texts]:
    """Return texts to learn from with ratings (N, raters, K), and others to test on."""
    world, sizes = World(study.seed), study.profile.attributes
    random = world.rng("attribute texts")
    train, test = (
        read_texts(study, world, *world.corpus(count, random)) for count in (sizes.texts, sizes.test_texts)
    )
    said = AttributeRaters(world).ratings(train.prompts, train.responses, sizes.raters, random)
    return train, torch.from_numpy(said).float(), test


# --- training -------------------------------------------------------------------------------------------


def rows_of(sizes: AttributeStudy, bootstrap: bool, seed: int) -> Tensor:
    """Return which ratings each head learns from (S M, ratings each), members of a seed side by side."""
    random = torch.Generator().manual_seed(seed)
    texts = torch.rand(sizes.seeds, sizes.texts, generator=random).argsort(1)[:, : sizes.texts_each]
    rows = (texts[..., None] * sizes.raters + torch.arange(sizes.raters)).flatten(1)
    rows = rows.repeat_interleave(sizes.members, 0)
    if bootstrap:
        rows = rows.gather(1, torch.randint(rows.shape[1], rows.shape, generator=random))
    return rows


def train_all(
    features: Tensor, ratings: Tensor, sizes: AttributeStudy, seed: int
) -> dict[str, AttributeHeads]:
    """Train every kind of head: by likelihood S M of them, with members `alike` (`mle`) and with bootstrap
    samples of their own; by regression and without noise S, with each seed's data.
    """
    alike, own = (rows_of(sizes, bootstrap, seed) for bootstrap in (False, True))
    rows: dict[str, Tensor] = {"mle": alike, "bootstrap": own}
    rows |= {"regression": alike[:: sizes.members], "deterministic": alike[:: sizes.members]}
    return {
        kind: train_attributes(
            features, ratings, one, loss=LOSS_OF[kind], settings=sizes.training, seed=seed + 1 + k
        )
        for k, (kind, one) in enumerate(rows.items())
    }


def urmes_of_policies(study: RewardStudy, policies: int, seed: int) -> AttributeHeads:
    """Train a URME for every policy, each with texts of its own, a tenth of what a seed has here, and members
    with bootstrap samples (policies M, ...).
    """
    sizes, (train, ratings, _) = study.profile.attributes, rated_texts(study)
    few = sizes.model_copy(update={"seeds": policies, "texts_each": max(10, sizes.texts_each // 10)})
    rows = rows_of(few, True, seed)
    return train_attributes(train.features, ratings, rows, loss="mle", settings=sizes.training, seed=seed)


def gatings_of(study: RewardStudy, heads: Mapping[str, AttributeHeads]) -> dict[str, Gating]:
    """Train a gating layer for every seed's first model of each kind, on notebook 03's pairs."""
    sizes, pairs = study.profile.attributes, study.features("train")
    chosen, rejected = (pairs[side][: sizes.gating_pairs] for side in ("chosen", "rejected"))
    options: dict[str, Any] = {"settings": sizes.gating, "hidden": sizes.hidden, "seed": study.seed}
    kinds = ("mle", "regression", "deterministic")
    return {
        kind: train_gating(chosen, rejected, firsts(heads[kind], sizes.seeds), **options) for kind in kinds
    }


def firsts(heads: AttributeHeads, seeds: int) -> AttributeHeads:
    """Return the first model of every seed."""
    return heads[:: len(heads.weight) // seeds]


# --- is the variance that of the raters? ----------------------------------------------------------------


def variance_table(heads: Mapping[str, AttributeHeads], texts: Texts, seeds: int) -> pd.DataFrame:
    """Compare what the first model of every seed states with the raters' true variance, by attribute.

    A row per kind, seed and attribute: `rank`, the rank correlation; `slope` of ln(true) on ln(stated);
    `ratio`, mean true over mean stated variance; `ratio_with_error`, the same with the squared error of the
    model's mean added to the true variance; `deviation`, the mean stated one; `fit`, R^2 of the mean.
    """
    tables = []
    for kind in ("mle", "regression"):
        told = firsts(heads[kind], seeds).ratings(texts.features)
        means, variances = (one.double().numpy().swapaxes(1, 2) for one in (told.means, told.variances))
        true, wanted = texts.variances.T, texts.means.T  # (K, N)
        logs, errors = np.log(variances), (means - wanted) ** 2
        centred = logs - logs.mean(-1, keepdims=True)
        found = {
            "rank": rank_correlations(variances, true),
            "slope": (centred * np.log(true)).sum(-1) / (centred**2).sum(-1),
            "ratio": true.mean(-1) / variances.mean(-1),
            "ratio_with_error": (true + errors).mean(-1) / variances.mean(-1),
            "deviation": np.sqrt(variances).mean(-1),
            "fit": 1 - errors.mean(-1) / wanted.var(-1),
        }  # (S, K) each
        index = pd.MultiIndex.from_product(
            [[kind], range(seeds), ATTRIBUTES], names=["kind", "seed", "attribute"]
        )
        flat = {name: one.reshape(-1) for name, one in found.items()}
        tables.append(pd.DataFrame(flat, index=index).reset_index())
    return pd.concat(tables, ignore_index=True)


def over_attributes(table: pd.DataFrame, kind: str, column: str) -> Array:
    """Return the median over attributes of a column of `variance_table`, by seed (S,)."""
    return table[table["kind"] == kind].groupby("seed")[column].median().to_numpy()


def calibration_curve(heads: AttributeHeads, texts: Texts, bins: int = 10) -> pd.DataFrame:
    """Return by attribute and tenth of the stated variance, over all seeds: mean `stated` and `true`."""
    stated = heads.ratings(texts.features).variances.double().numpy()  # (S, N, K)
    rows = []
    for k, name in enumerate(ATTRIBUTES):
        flat, true = stated[..., k].ravel(), np.tile(texts.variances[:, k], len(stated))
        for part in np.array_split(np.argsort(flat, kind="stable"), bins):
            rows.append({"attribute": name, "stated": flat[part].mean(), "true": true[part].mean()})
    return pd.DataFrame(rows)


# --- one reward -----------------------------------------------------------------------------------------


def accuracy_table(
    study: RewardStudy, heads: Mapping[str, AttributeHeads], gatings: Mapping[str, Gating]
) -> pd.DataFrame:
    """Return how often each seed's model of a kind ranks held-out pairs as gold does, with the prior weights
    and with its gating: `kind`, `weights`, `seed`, `accuracy`.
    """
    seeds, sides, gold = study.profile.attributes.seeds, *_evaluation(study)
    rows = []
    for kind, gating in gatings.items():
        told = [firsts(heads[kind], seeds).ratings(one) for one in sides]
        for name in ("prior", "gating"):
            weights = [PRIOR, PRIOR] if name == "prior" else [gating(one) for one in sides]
            first, second = (reward(*one) for one in zip(told, weights, strict=True))
            right = (((first > second).numpy() == (gold > 0)) & (gold != 0)).sum(1) / (gold != 0).sum()
            rows += [
                {"kind": kind, "weights": name, "seed": k, "accuracy": one} for k, one in enumerate(right)
            ]
    return pd.DataFrame(rows)


def _evaluation(study: RewardStudy) -> tuple[tuple[Tensor, Tensor], Array]:
    """Return the features of the evaluation pairs' two sides, and gold of the first minus the second."""
    pairs, features = study.part("evaluation"), study.features("evaluation")
    return (features["chosen"], features["rejected"]), (
        pairs["gold_chosen"] - pairs["gold_rejected"]
    ).to_numpy()


def sums_table(heads: AttributeHeads, gating: Gating, texts: Texts) -> pd.DataFrame:
    """Return, for the prior weights and for the gating's, the rank correlation of each sum of variances with
    the variance of a reward by raters, sum of w^2 times their variance: `weights`, `how`, `seed`, `rank`.
    """
    told, rows = heads.ratings(texts.features), []
    for name, weights in (("prior", PRIOR), ("gating", gating(texts.features))):
        true = (weights.double().numpy() ** 2 * texts.variances).sum(-1)
        for how in ("plain", "weighted"):
            ranks = rank_correlations(reward_variance(told, weights, how).double().numpy(), true)
            rows += [{"weights": name, "how": how, "seed": k, "rank": one} for k, one in enumerate(ranks)]
    return pd.DataFrame(rows)


# --- URME -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uncertainty:
    """What a model of every seed says of texts (S, N): reward, and how unsure it is by each measure."""

    reward: Array
    measures: dict[str, Array]


def uncertainty_of(
    heads: AttributeHeads, features: Tensor, seeds: int, weights: Tensor = PRIOR
) -> Uncertainty:
    """Return of every seed's URME, with fixed weights: `URM`, the first member's sum of variances, and
    `Eq. 7` and `Eq. 8`; `aleatoric` and `epistemic` are the parts of the reward's total variance.
    """
    told = heads.ratings(features)
    members = [
        one.unflatten(0, (seeds, -1)).swapaxes(0, 1) for one in (told.means, told.variances)
    ]  # (M, S, N, K)
    rewards, spread = (members[0] * weights).sum(-1), (members[1] * weights**2).sum(-1)
    aleatoric, epistemic = total_variance(rewards, spread)
    measures = {
        "URM": members[1][0].sum(-1),
        "Eq. 7": largest_gap(rewards),
        "Eq. 8": largest_covariance(members[1]),
        "aleatoric": aleatoric,
        "epistemic": epistemic,
    }
    return Uncertainty(
        rewards.mean(0).double().numpy(), {name: one.double().numpy() for name, one in measures.items()}
    )


def stated_scores(head: AttributeHeads, texts: Mapping[str, Tensor]) -> pd.DataFrame:
    """Return what one head states of texts (N, d) of several kinds: `texts`, `text`, `attribute`, `mean`,
    `deviation`.
    """
    rows = []
    for name, features in texts.items():
        told = head.ratings(features)
        for text, (means, logs) in enumerate(zip(told.means[0], told.log_deviations[0], strict=True)):
            for attribute, one, log in zip(ATTRIBUTES, means.tolist(), logs.tolist(), strict=True):
                row = {"texts": name, "text": text, "attribute": attribute, "mean": one}
                rows.append(row | {"deviation": float(np.exp(log))})
    return pd.DataFrame(rows)


def outside_features(study: RewardStudy, count: int) -> dict[str, Seen]:
    """Return what heads see (N, d), and the words (N,), of texts that they have not learned from: strings of
    digits (A.2), words in random order, and texts of another world, whose facts are others.
    """
    world, other = World(study.seed), World(study.seed + 1)
    random = world.rng("outside texts")
    prompts, responses = world.corpus(count, random)
    texts = {
        "digits": (world.digit_strings(count, random), world.digit_strings(count, random)),
        "shuffled words": (prompts, [" ".join(random.permutation(text.split())) for text in responses]),
        "another world": other.corpus(count, random),
    }
    return {name: (study.read(*one)[0], words_of(one[1])) for name, one in texts.items()}


def auroc(inside: Array, outside: Array) -> Array:
    """Return how often a score outside is the larger one, ties counted half, along the last axis."""
    both = rankdata(np.concatenate([inside, outside], axis=-1), axis=-1)
    n, m = inside.shape[-1], outside.shape[-1]
    return (both[..., n:].sum(-1) - m * (m + 1) / 2) / (n * m)


def outside_table(
    heads: Mapping[str, AttributeHeads], train: Seen, test: Seen, outside: Mapping[str, Seen], seeds: int
) -> pd.DataFrame:
    """Return AUROCs of out-of-distribution texts by `measure`, `texts`, `members` and seed; the baselines,
    distance from the mean length and Mahalanobis' distance of features, have one seed.
    """
    rows: list[dict[str, Any]] = []
    for members, kind in (("alike", "mle"), ("bootstrap", "bootstrap")):
        weights = PRIOR if heads[kind].weight.shape[1] == len(PRIOR) else torch.ones(1)
        inside = uncertainty_of(heads[kind], test[0], seeds, weights).measures
        for name, (features, _) in outside.items():
            found = uncertainty_of(heads[kind], features, seeds, weights).measures
            for measure in ("URM", "Eq. 7", "Eq. 8"):
                values = auroc(inside[measure], found[measure])
                told = {"texts": name, "members": members, "measure": measure}
                rows += [told | {"seed": k, "auroc": one} for k, one in enumerate(values)]
    mahalanobis = _mahalanobis(train[0])
    for name, (features, lengths) in outside.items():
        far = [np.abs(one - train[1].mean()) for one in (test[1], lengths)]
        pairs = {"length": far, "Mahalanobis": [mahalanobis(one) for one in (test[0], features)]}
        for measure, both in pairs.items():
            base = {"texts": name, "members": "none", "measure": measure}
            rows.append(base | {"seed": 0, "auroc": float(auroc(*both))})
    return pd.DataFrame(rows)


def _mahalanobis(known: Tensor) -> Callable[[Tensor], Array]:
    """Return the function that gives features' distance (N,) from those that are known (texts, d)."""
    centre = known.double().mean(0)
    scatter = torch.cov((known.double() - centre).T) + 1e-6 * torch.eye(known.shape[1], dtype=torch.float64)
    root = torch.linalg.cholesky(scatter)
    return lambda one: (
        torch.linalg.solve_triangular(root, (one.double() - centre).T, upper=False).norm(dim=0).numpy()
    )


# --- filtering and best-of-n ----------------------------------------------------------------------------


def filtering_tables(
    study: RewardStudy, heads: Mapping[str, AttributeHeads]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return accuracy by gold over held-out pairs when the least certain are left out (Figure 6c), by
    `measure`, seed and share `kept`; and the accuracy of the more certain half minus that of all: over `all`
    pairs, and `equal margin`, the mean of such differences within tenths of the absolute margin.

    A pair's uncertainty is the larger one of its two responses'. `URM` ranks by its own mean, URME by the
    mean of its members.
    """
    seeds, sides, gold = study.profile.attributes.seeds, *_evaluation(study)
    curves, halves = [], []
    for name, kind, measure in (
        ("URM", "mle", "URM"), ("URME alike", "mle", "Eq. 7"), ("URME bootstrap", "bootstrap", "Eq. 7"),
    ):  # fmt: skip
        said = [uncertainty_of(heads[kind], one, seeds) for one in sides]
        gap = said[0].reward - said[1].reward
        if name == "URM":
            told = [firsts(heads[kind], seeds).ratings(one) for one in sides]
            gap = (reward(told[0], PRIOR) - reward(told[1], PRIOR)).double().numpy()
        unsure = np.maximum(*(one.measures[measure] for one in said))  # (S, N)
        decided = gold != 0
        gap, unsure, right = gap[:, decided], unsure[:, decided], (gap > 0)[:, decided] == (gold > 0)[decided]
        ordered = np.take_along_axis(right, unsure.argsort(1), 1)
        shares = ordered.cumsum(1) / np.arange(1, ordered.shape[1] + 1)
        for share in KEPT:
            values = shares[:, int(share * ordered.shape[1]) - 1]
            curves += [
                {"measure": name, "kept": share, "seed": k, "accuracy": v} for k, v in enumerate(values)
            ]
        for what, bins in (("all", 1), ("equal margin", 10)):
            values = _certain_half(right, unsure, np.abs(gap), bins)
            halves += [{"measure": name, "among": what, "seed": k, "gain": v} for k, v in enumerate(values)]
    return pd.DataFrame(curves), pd.DataFrame(halves)


def _certain_half(right: NDArray[np.bool_], unsure: Array, margin: Array, bins: int) -> Array:
    """Return the accuracy of the more certain half minus that of all, a mean over bins of the margin (S,)."""
    by_margin = margin.argsort(1)
    differences = []
    for part in np.array_split(by_margin, bins, axis=1):
        order = np.take_along_axis(unsure, part, 1).argsort(1)
        hits = np.take_along_axis(np.take_along_axis(right, part, 1), order, 1)
        half = hits.shape[1] // 2
        differences.append(hits[:, :half].mean(1) - hits.mean(1))
    return np.mean(differences, axis=0)


def best_of_n_table(study: RewardStudy, reference: Path, heads: Mapping[str, AttributeHeads]) -> pd.DataFrame:
    """Return gold gained by the best of n responses of the reference policy, without bias from finitely many
    (Table 2): by `chooser`, `n` and seed, with the `kl` of best-of-n.
    """
    world, sizes = World(study.seed), study.profile.attributes
    prompts = world.prompts(sizes.prompts, world.rng("best of n"))
    asked = [prompt for prompt in prompts for _ in range(sizes.samples)]
    answers = sample_reference(reference, asked, study.seed)
    shape = (-1, sizes.prompts, sizes.samples)
    features, gold = study.read(asked, answers)[0], world.gold(asked, answers).reshape(shape[1:])
    single = reward(firsts(heads["mle"], sizes.seeds).ratings(features), PRIOR)
    proxies = {"URM": single.double().numpy()} | {
        f"URME {name}": uncertainty_of(heads[kind], features, sizes.seeds).reward
        for name, kind in (("alike", "mle"), ("bootstrap", "bootstrap"))
    }
    rows = []
    for name, proxy in proxies.items():
        for k, one in enumerate(proxy.reshape(shape)):
            for n in (n for n in NS if n <= sizes.samples):
                gain = _best_of_n_gain(one, gold, n)
                rows.append({"chooser": name, "seed": k, "n": n, "kl": best_of_n_kl(n), "gain": gain})
    return pd.DataFrame(rows)


def _best_of_n_gain(proxy: Array, gold: Array, n: int) -> float:
    return float((best_of_n(proxy, gold, n)[1] - gold.mean(1)).mean())


# --- merging --------------------------------------------------------------------------------------------


def merging_table(
    study: RewardStudy, train: Texts, ratings: Tensor, heads: Mapping[str, AttributeHeads]
) -> pd.DataFrame:
    """Train backbones and heads together, the first models of as many seeds as a URME has members, each with
    ratings of its own, and merge them (Appendix C.1): a row per kind and held-out pair, whose ranking by gold
    the share `members` of the members finds, and the `ensemble` by its mean or the `merged` model, or not.
    """
    sizes, (model, tokenizer) = study.profile.attributes, load_reward_model(study.reward_model)
    read = partial(conversation_ids, tokenizer, max_length=study.settings.max_length)
    own = sizes.backbone_texts // sizes.members * sizes.raters
    rows = torch.arange(own * sizes.members).view(sizes.members, own)
    known = rows.numel() // sizes.raters
    pairs = study.part("evaluation")
    gold = (pairs["gold_chosen"] - pairs["gold_rejected"]).to_numpy()
    sides = [read(pairs["prompt"].tolist(), pairs[side].tolist()) for side in ("chosen", "rejected")]
    tables = []
    for kind in ("mle", "regression", "deterministic"):
        trained = train_attribute_backbones(
            model,
            firsts(heads[kind], sizes.seeds)[: sizes.members],
            read(train.prompts[:known], train.responses[:known]),
            ratings[:known],
            rows,
            loss=LOSS_OF[kind],
            settings=sizes.backbone,
            seed=study.seed,
        )
        gaps = []
        for one in (trained, trained.merged()):
            first, second = (reward(one.ratings(side), PRIOR).double().numpy() for side in sides)
            gaps.append(first - second)  # (M or 1, N)
        right = [(gap > 0) == (gold > 0) for gap in (gaps[0], gaps[0].mean(0), gaps[1][0])]
        found = {
            "members": right[0].mean(0),
            "ensemble": right[1].astype(float),
            "merged": right[2].astype(float),
        }
        tables.append(pd.DataFrame(found)[gold != 0].assign(kind=kind))
    return pd.concat(tables, ignore_index=True)


# --- which variance should weigh the penalty? -----------------------------------------------------------


def bench_table(sizes: AttributeStudy, worlds: Sequence[int], target: float = 0.5) -> pd.DataFrame:
    """Train policies on stored responses at equal KL, each with a URME of its own, with several weights.

    Features are those of a random network of 64 units over the world's features of texts. A row for each
    world and `weights`, all with the total variance's values: `log_ratio`, ln of the placebo's Var / gain^2
    over theirs; `rank`, their rank correlation with the variance of the URMEs' rewards over policies; and
    with gold within prompts, `gold`.
    """
    return pd.DataFrame([row for world in worlds for row in _bench_rows(World(int(world)), sizes, target)])


def _bench_rows(world: World, sizes: AttributeStudy, target: float) -> Iterator[dict[str, float | int | str]]:
    texts = stored_texts(world, sizes.bench_prompts, sizes.bench_responses)
    shape, random = texts.gold.shape, world.rng("URME bench")
    errors, consensus, known = _bench_judges(world, sizes, texts.features.reshape(texts.gold.size, -1))
    bench = Bench(
        None, texts.gold, consensus.reshape(shape), known["errors"].reshape(shape), errors.reshape(-1, *shape)
    )
    total = known["total"].reshape(shape)
    field = placebo(total, texts.varying, random, unrelated=[texts.gold])
    weights = {"placebo": with_values_of(field, total), "none": np.ones(shape)}
    weights |= {name: with_values_of(normal_scores(one.reshape(shape)), total) for name, one in known.items()}
    compared = None
    for name, one in weights.items():
        trained = at_kl(bench, Objective(one), target)
        compared = compared or trained
        varies = name != "none"
        yield {
            "world": world.seed,
            "weights": name,
            "rank": float(rank_correlations(one.ravel(), known["errors"])) if varies else 0.0,
            "gold": float(np.corrcoef(_centred(one), _centred(texts.gold))[0, 1]) if varies else 0.0,
            "log_ratio": trained.log_ratio(compared),
            **trained.row(),
        }


def _bench_judges(
    world: World, sizes: AttributeStudy, stored: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """Train a URME for every policy; return errors (policies, N), the mean reward (N,), and what is known of
    the stored texts (N,): the parts of the total variance, the URMEs' mean, and the errors' true variance.
    """
    random, members = world.rng("URME judges"), sizes.members
    asked, answers = world.corpus(sizes.texts // 4, random)
    said = torch.from_numpy(AttributeRaters(world).ratings(asked, answers, 1, random)).float()
    inner = random.standard_normal((stored.shape[1] + 1, 64)) / np.sqrt(stored.shape[1])
    seen = [_network(one, inner) for one in (world.features(asked, answers), stored)]
    each = max(20, len(asked) // 5)
    rows = torch.from_numpy(
        random.integers(len(asked), size=(sizes.bench_policies, each))
    )  # own texts, own raters
    rows = rows.repeat_interleave(members, 0)
    rows = rows.gather(1, torch.from_numpy(random.integers(each, size=rows.shape)))
    heads = train_attributes(seen[0], said, rows, loss="mle", settings=sizes.training, seed=world.seed)
    told = heads.ratings(seen[1])
    rewards, spread = reward(told, PRIOR), reward_variance(told, PRIOR)  # (policies M, N)
    parts = [one.unflatten(0, (-1, members)).swapaxes(0, 1) for one in (rewards, spread)]
    aleatoric, epistemic = (one.mean(0).double().numpy() for one in total_variance(*parts))
    judged = parts[0].mean(0).double().numpy()
    consensus = judged.mean(0)
    known = {"aleatoric": aleatoric, "epistemic": epistemic, "total": aleatoric + epistemic}
    return judged - consensus, consensus, known | {"errors": judged.var(0, ddof=1)}


def _network(features: Array, inner: Array) -> Tensor:
    """Return 64 random ramps of features and a constant (N, 64)."""
    return torch.from_numpy(np.maximum(np.c_[features, np.ones(len(features))] @ inner, 0)).float()


def _centred(values: Array) -> Array:
    return (values - values.mean(1, keepdims=True)).ravel()


# --- people ---------------------------------------------------------------------------------------------

FOLDS, HEARD, APART = 5, 4, 6  # of texts; ratings of a text that are learned from, and that are held out
GROUP = 64  # texts of one domain that the best of is chosen from, as if they answered one prompt
COMMITTED = RESULTS / "people"
PEOPLE_TABLES = ("urm", "urm_outside", "urm_best_of_n")


def measured_people(study: Study) -> dict[str, pd.DataFrame]:
    """Return `people_table`, `people_outside` and `people_best_of_n` (`PEOPLE_TABLES`) of the texts that a
    profile names, or, where it names none, what is committed of the profile `pretrained`.
    """
    if study.profile.raters is None or study.profile.raters.texts is None:
        return {name: pd.read_parquet(COMMITTED / f"{name}.parquet") for name in PEOPLE_TABLES}
    known, sizes = bench(study), study.profile.attributes
    domains = known.texts["domain"].to_numpy(dtype=str)
    given = known.features, known.ratings.said, domains
    gentle = sizes.training.model_copy(
        update={"learning_rate": 3e-3}
    )  # at more, heads of wide features diverge
    few = gentle.model_copy(update={"epochs": 3.0})
    apart = people_outside(
        *given, words_of(known.texts["text"]), sizes.model_copy(update={"training": gentle}), study.seed
    )
    best = people_best_of_n(*given, few, sizes.members, study.seed)
    return dict(zip(PEOPLE_TABLES, (people_table(*given, few, study.seed), apart, best), strict=True))


@dataclass(frozen=True)
class PeopleApart:
    """Ratings of texts (N, people), divided: of each text those that are learned from, those that are held
    out, and the fold whose heads have not seen it (N,); numbers of the ratings that each fold's heads learn
    from (folds, ratings).
    """

    heard: Array
    apart: Array
    fold: NDArray[np.int64]
    rows: Tensor

    @classmethod
    def of(cls, said: Array, seed: int) -> "PeopleApart":
        """Divide ratings, NaN where fewer were asked."""
        random = np.random.default_rng(seed)
        order = np.where(np.isnan(said), 2, random.random(said.shape)).argsort(1)
        mixed = np.take_along_axis(said, order, 1)  # each text's people at random, those who were asked first
        fold = random.permutation(len(said)) % FOLDS
        known = min(int((fold != k).sum()) for k in range(FOLDS))
        texts = [random.permutation(np.flatnonzero(fold != k))[:known] for k in range(FOLDS)]
        rows = torch.from_numpy(np.stack(texts))[..., None] * HEARD + torch.arange(HEARD)
        return cls(mixed[:, :HEARD], mixed[:, HEARD : HEARD + APART], fold, rows.flatten(1))

    def heads(
        self, features: Tensor, loss: Loss, settings: HeadTraining, seed: int, members: int = 1
    ) -> AttributeHeads:
        """Train so many heads of one attribute for each fold, one after another."""
        rated = torch.from_numpy(self.heard)[..., None].float()
        rows = self.rows.repeat_interleave(members, 0)
        return train_attributes(features, rated, rows, loss=loss, settings=settings, seed=seed)


def people_table(
    features: Array, said: Array, domains: NDArray[np.str_], settings: HeadTraining, seed: int
) -> pd.DataFrame:
    """Train URMs of one attribute on what people rated, with people and one fold of texts held out.

    `features` (N, d) of texts, ratings `said` (N, people), NaN where fewer were asked, `domains` (N,). A row
    for each fold, loss and domain (`all`: their mean, by numbers of texts): `rank`, the rank correlation
    of the stated variance with that of the held-out people; `ceiling`, that of the variance of the people
    heard; `ratio`, mean of the held-out people's variance over mean stated; `deviation`, the mean stated one.
    """
    divided, inputs, tables = PeopleApart.of(said, seed), torch.from_numpy(features).float(), []
    losses: tuple[Loss, ...] = ("mle", "regression")
    for loss in losses:
        heads = divided.heads(inputs, loss, settings, seed)
        stated = heads.ratings(inputs).variances[..., 0].double().numpy()
        for k in range(FOLDS):
            test = divided.fold == k
            rows = _people_rows(stated[k, test], divided.apart[test], divided.heard[test], domains[test])
            tables.append(rows.assign(fold=k, kind=loss))
    return pd.concat(tables, ignore_index=True)


def people_best_of_n(
    features: Array, said: Array, domains: NDArray[np.str_], settings: HeadTraining, members: int, seed: int
) -> pd.DataFrame:
    """Choose the best of n texts that no head has seen, from groups of one domain; what counts is the mean of
    people who were not heard (Table 2). A row for each fold, `chooser` and `n`: `gain` over the group's mean
    in points of the scale, `most`, the gain of who knows these people's mean, and best-of-n's `kl`.

    Choosers: the deterministic twin, one URM, and the mean of a URME of so many `members`.
    """
    divided, inputs = PeopleApart.of(said, seed), torch.from_numpy(features).float()
    random, counts = np.random.default_rng(seed + 1), divided.apart.mean(1)
    single = divided.heads(inputs, "deterministic", settings, seed).ratings(inputs).means[..., 0]
    several = divided.heads(inputs, "mle", settings, seed, members).ratings(inputs).means[..., 0]
    urme = several.unflatten(0, (FOLDS, members)).double().numpy()
    choosers = {"deterministic": single.double().numpy(), "URM": urme[:, 0], "URME": urme.mean(1)}
    rows = []
    for k in range(FOLDS):
        parts = [
            random.permutation(np.flatnonzero((divided.fold == k) & (domains == one)))
            for one in np.unique(domains)
        ]
        groups = np.concatenate([one[: len(one) // GROUP * GROUP].reshape(-1, GROUP) for one in parts])
        gold = counts[groups]
        for n in (n for n in NS if n <= GROUP):
            most = _best_of_n_gain(gold, gold, n)
            for name, proxy in choosers.items():
                about = {"fold": k, "chooser": name, "n": n, "kl": best_of_n_kl(n)}
                rows.append(about | {"gain": _best_of_n_gain(proxy[k][groups], gold, n), "most": most})
    return pd.DataFrame(rows)


def _people_rows(stated: Array, apart: Array, heard: Array, domains: NDArray[np.str_]) -> pd.DataFrame:
    true, half = apart.var(1, ddof=1), heard.var(1, ddof=1)
    rows, weights = [], []
    for name in np.unique(domains):
        here = domains == name
        rows.append(
            {
                "domain": str(name),
                "rank": float(rank_correlations(stated[here], true[here])),
                "ceiling": float(rank_correlations(half[here], true[here])),
                "ratio": true[here].mean() / stated[here].mean(),
                "deviation": np.sqrt(stated[here]).mean(),
            }
        )
        weights.append(here.sum())
    table = pd.DataFrame(rows)
    numbers = table.drop(columns="domain")
    mean_row = {"domain": "all"} | {name: np.average(numbers[name], weights=weights) for name in numbers}
    return pd.concat([table, pd.DataFrame([mean_row])], ignore_index=True)


def people_outside(
    features: Array, said: Array, domains: NDArray[np.str_], words: Array, sizes: AttributeStudy, seed: int
) -> pd.DataFrame:
    """Train URMEs on half of the films, tell tweets and editorials from the other half: `outside_table`."""
    random, inputs = np.random.default_rng(seed), torch.from_numpy(features).float()
    films = random.permutation(np.flatnonzero(domains == "films"))
    known, test = np.array_split(films, 2)
    order = np.where(np.isnan(said[known]), 2, random.random(said[known].shape)).argsort(1)[:, : sizes.raters]
    rated = torch.from_numpy(np.take_along_axis(said[known], order, 1))[..., None].float()
    own = sizes.model_copy(update={"texts": len(known), "texts_each": min(sizes.texts_each, len(known))})
    heads = train_all(inputs[known], rated, own, seed)
    apart = {name: np.flatnonzero(domains == name) for name in ("tweets", "editorials")}
    seen = {name: (inputs[rows], words[rows]) for name, rows in apart.items()}
    inside = [(inputs[rows], words[rows]) for rows in (known, test)]
    return outside_table(heads, inside[0], inside[1], seen, sizes.seeds)


# --- estimates over seeds or worlds ---------------------------------------------------------------------


def estimate(table: pd.DataFrame, column: str, **chosen: object) -> Estimate:
    """Return the mean of a column over the rows that have the chosen values, with Student's interval."""
    for name, value in chosen.items():
        table = table[table[name] == value]
    return mean(table[column].to_numpy())


def paired(
    table: pd.DataFrame, column: str, by: str, first: str, second: str, unit: str = "seed"
) -> Estimate:
    """Return the mean over units of a column's value at the first name minus that at the second."""
    wide = table.pivot(index=unit, columns=by, values=column)
    return mean((wide[first] - wide[second]).to_numpy())
