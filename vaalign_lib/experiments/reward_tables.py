"""The tables of notebook 03: what ensembles of each kind disagree about, and whether that is right."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from vaalign_lib.data.pairs import accuracy_by_category
from vaalign_lib.data.world.world import SLOPES, World
from vaalign_lib.experiments.references import sample_reference
from vaalign_lib.experiments.reward_models import RewardStudy
from vaalign_lib.models import conversation_ids, fitting_ids
from vaalign_lib.policies.best_of_n import gains
from vaalign_lib.profiles import HeadTraining
from vaalign_lib.rewards.base import Interval, RewardSource
from vaalign_lib.rewards.calibration import (
    accuracy_after_dropping,
    between_ensembles,
    coverage,
    difference_ratio,
    error_by_deviation,
    fit_temperature,
    fit_temperature_to_labels,
    label_loss,
    rank_correlation,
    sample_variance,
)
from vaalign_lib.rewards.classifier import TINY, features_and_scores, load_reward_model, longest
from vaalign_lib.rewards.heads import HeadKind, Heads
from vaalign_lib.rewards.simulated_judge import PersistentJudges, SimulatedJudge
from vaalign_lib.statistics.tests import proportion

Array = NDArray[np.float64]
_LOG = logging.getLogger(__name__)
PAPER = "the paper's recipe"
BACKBONES = "separate small backbones"
TRAINED: dict[
    HeadKind, str
] = {  # kinds of heads trained longer, with larger steps, and their names in tables
    "paper": "same data and order",
    "order": "own order",
    "anchored": "anchored to their start",
    "mlp": "small networks",
    "bootstrap": "bootstrap samples",
    "disjoint": "own fifth of the data",
}


@dataclass(frozen=True)
class Scores:
    """Members' scores of pairs: `chosen` and `rejected` (pairs, members)."""

    chosen: Array
    rejected: Array

    @property
    def gap(self) -> Array:
        """Mean reward of the chosen response minus that of the rejected one (pairs,)."""
        return np.asarray((self.chosen - self.rejected).mean(1))

    @property
    def gap_variance(self) -> Array:
        """Sample variance of that difference over members (pairs,)."""
        return sample_variance(self.chosen - self.rejected)


def scores_of_heads(heads: Heads, features: Mapping[str, Tensor]) -> Scores:
    """Return what the first ensemble of a grid of heads says about pairs."""
    sides = [heads.scores(features[side])[0].T.double().numpy() for side in ("chosen", "rejected")]
    return Scores(*sides)


def all_kinds(study: RewardStudy) -> dict[str, dict[str, Scores]]:
    """Train one ensemble of every kind and return its scores by kind and part."""
    features = {part: study.features(part) for part in ("held_out", "evaluation")}
    sizes = study.profile.ensembles
    trained = {PAPER: study.heads("paper", sizes.paper, keep_first=True)[0]}
    for kind, name in TRAINED.items():
        trained[name] = study.heads(kind, sizes.trained)[0]
    scores = {
        name: {part: scores_of_heads(heads, features[part]) for part in features}
        for name, heads in trained.items()
    }
    if study.backbone == TINY:  # separate backbones are trained in the tiny architecture only
        found = {part: study.backbones(part) for part in features}
        scores[BACKBONES] = {
            part: Scores(f["chosen"].double().numpy(), f["rejected"].double().numpy())
            for part, f in found.items()
        }
    return scores


# --- the reward model -------------------------------------------------------------------------------


def accuracy_table(study: RewardStudy) -> pd.DataFrame:
    """Return how often the reward model of stage 1 ranks pairs as labelled, and as the gold reward."""
    pairs, features = study.part("evaluation"), study.features("evaluation")
    gap = (features["chosen_score"] - features["rejected_score"]).double().numpy()
    labels = {"labels": (gap > 0, np.ones(len(gap), dtype=bool))}
    if study.embedded:
        labels["gold reward"] = ranked_rightly(gap, pairs)
    tables = [
        accuracy_by_category(pairs[counted], correct[counted]).assign(against=against)
        for against, (correct, counted) in labels.items()
    ]
    return pd.concat(tables, ignore_index=True)


def ranked_rightly(gap: Array, pairs: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which pairs are ranked as the gold reward ranks them, and which it does not tie."""
    gold = (pairs["gold_chosen"] - pairs["gold_rejected"]).to_numpy()
    return np.sign(gap) == np.sign(gold), gold != 0


# --- disagreement -----------------------------------------------------------------------------------


def figure_8_table(study: RewardStudy, scores: Scores) -> pd.DataFrame:
    """Return the variances of Figure 8, a row per pair: `category`, `accepted`, `difference`, `share`.

    `difference_ratio_fresh` and `accepted_fresh` leave out the first model, the head of stage 1.
    """
    return pd.DataFrame(
        {
            "category": study.part("evaluation")["category"],
            "accepted": sample_variance(scores.chosen),
            "difference": scores.gap_variance,
            "difference_ratio": difference_ratio(scores.chosen, scores.rejected),
            "difference_ratio_fresh": difference_ratio(scores.chosen[:, 1:], scores.rejected[:, 1:]),
            "accepted_fresh": sample_variance(scores.chosen[:, 1:]),
        }
    )


def steps_table(study: RewardStudy, points: int = 10) -> tuple[pd.DataFrame, dict[int, Heads]]:
    """Return variances along training for the paper's recipe and for longer training with larger steps.

    Returns:
        A row per recipe and step, and the heads of the paper's recipe by step.
    """
    features, sizes = study.features("evaluation"), study.profile.ensembles
    pairs = len(study.part("train"))
    recipes: dict[str, tuple[HeadKind, HeadTraining, bool]] = {
        PAPER: ("paper", sizes.paper, True),
        "same data, larger steps": ("paper", sizes.trained, False),
        "bootstrap samples, larger steps": ("bootstrap", sizes.trained, False),
    }
    rows, kept = [], {}
    for recipe, (kind, settings, keep_first) in recipes.items():
        last = int(np.ceil(settings.epochs * np.ceil(pairs / settings.batch_size)))
        steps = sorted({0, *np.geomspace(1, last, points).astype(int).tolist(), last})
        _, copies = study.heads(kind, settings, snapshots=steps, keep_first=keep_first)
        for step, heads in copies.items():
            scores = scores_of_heads(heads, features)
            gaps = torch.as_tensor(scores.chosen - scores.rejected)
            rows.append(
                {
                    "recipe": recipe,
                    "step": step,
                    "accepted": np.median(sample_variance(scores.chosen)),
                    "difference": np.median(scores.gap_variance),
                    "loss": float(-functional.logsigmoid(gaps).mean()),
                }
            )
        if recipe == PAPER:
            kept = copies
    return pd.DataFrame(rows), kept


def kinds_table(study: RewardStudy, kinds: Mapping[str, Mapping[str, Scores]]) -> pd.DataFrame:
    """Return what tells the kinds apart, a row each.

    Columns: `relative_variance` (median variance of accepted responses over the variance of the mean
    reward), `difference_ratio` (median), `accuracy` and, where there is a gold reward,
    `rank_correlation` of squared error and variance and `temperature`; else `label_loss` without and
    with the variances.
    """
    pairs, held_out = study.part("evaluation"), study.part("held_out")
    rows = []
    for kind, parts in kinds.items():
        scores = parts["evaluation"]
        rewards = np.concatenate([scores.chosen.mean(1), scores.rejected.mean(1)])
        row: dict[str, object] = {
            "kind": kind,
            "relative_variance": np.median(sample_variance(scores.chosen)) / rewards.var(),
            "difference_ratio": np.median(difference_ratio(scores.chosen, scores.rejected)),
        }
        if study.embedded:
            correct, counted = ranked_rightly(scores.gap, pairs)
            correct = correct[counted]
            errors = gold_errors(parts, held_out, pairs)
            found = rank_correlation(*errors["evaluation"])
            row |= {"rank_correlation": found.value, "rank_correlation_low": found.low}
            row |= {"rank_correlation_high": found.high, "temperature": fit_temperature(*errors["held_out"])}
        else:
            correct = scores.gap > 0
            differing = parts["held_out"].gap_variance > 0  # not cut to the same tokens
            temperature = fit_temperature_to_labels(
                parts["held_out"].gap[differing], parts["held_out"].gap_variance[differing]
            )
            row |= {
                "label_loss": label_loss(scores.gap, scores.gap_variance, 0),
                "label_loss_with_variance": label_loss(scores.gap, scores.gap_variance, temperature),
                "temperature": temperature,
            }
        share = proportion(correct)
        row |= {"accuracy": share.value, "accuracy_low": share.low, "accuracy_high": share.high}
        rows.append(row)
    return pd.DataFrame(rows)


def gold_errors(
    parts: Mapping[str, Scores], held_out: pd.DataFrame, evaluation: pd.DataFrame
) -> dict[str, tuple[Array, Array]]:
    """Return errors of reward differences against the gold reward, with their predicted variances.

    Rewards have a unit of their own; one factor, by least squares on the held-out pairs, turns it into
    the gold reward's.
    """
    tables = {"held_out": held_out, "evaluation": evaluation}
    gold = {name: (t["gold_chosen"] - t["gold_rejected"]).to_numpy() for name, t in tables.items()}
    gap = parts["held_out"].gap
    unit = float(gap @ gold["held_out"] / (gap @ gap))
    return {
        name: (gold[name] - unit * parts[name].gap, unit**2 * parts[name].gap_variance) for name in tables
    }


def dropping_table(study: RewardStudy, kinds: Mapping[str, Mapping[str, Scores]]) -> pd.DataFrame:
    """Return accuracy once the pairs of largest variance are left out, a row per kind and share."""
    pairs = study.part("evaluation")
    tables = []
    for kind, parts in kinds.items():
        scores = parts["evaluation"]
        correct, counted = scores.gap > 0, np.ones(len(pairs), dtype=bool)
        if study.embedded:
            correct, counted = ranked_rightly(scores.gap, pairs)
        table = accuracy_after_dropping(correct[counted], scores.gap_variance[counted])
        tables.append(table.assign(kind=kind))
    return pd.concat(tables, ignore_index=True)


# --- calibration ------------------------------------------------------------------------------------


def independent_gaps(heads: Heads, features: Mapping[str, Tensor]) -> Array:
    """Return every head's score of the chosen minus the rejected response (ensembles, members, pairs).

    Differences, for Bradley-Terry labels leave an ensemble's zero point open.
    """
    gaps = heads.scores(features["chosen"]) - heads.scores(features["rejected"])
    return gaps.double().numpy()


def spread_errors(gaps: Array) -> tuple[Array, Array]:
    """Return how far ensembles are from the mean of all, with what each says about itself.

    Pair k is judged by ensemble k modulo their number, so that a row rests on one ensemble. The
    deviation is enlarged by sqrt(E / (E - 1)), for the mean contains the ensemble itself.

    Args:
        gaps: (ensembles, members, pairs) of ensembles trained independently of each other.
    """
    ensembles, _, pairs = gaps.shape
    mean = gaps.mean(1)
    rows = np.arange(pairs)
    one = rows % ensembles
    error = (mean - mean.mean(0))[one, rows] * np.sqrt(ensembles / (ensembles - 1))
    variance = gaps.var(1, ddof=1)[one, rows]
    return error[variance > 0], variance[variance > 0]


def spread_correlations(gaps: Array) -> Array:
    """Return, for each ensemble, the rank correlation of its variance with the spread between ensembles.

    Args:
        gaps: (ensembles, members, pairs).

    Returns:
        Spearman's correlation over pairs (ensembles,).
    """
    _, between = between_ensembles(gaps)
    own = gaps.var(1, ddof=1)
    return np.array([spearmanr(variance, between).statistic for variance in own])


def calibration_tables(
    errors: Mapping[str, Mapping[str, tuple[Array, Array]]],
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return error by deviation, coverage, and temperatures, before and after the repair.

    Args:
        errors: for each question its `held_out` errors and variances, which fit the temperature, and its
            `evaluation` ones.
    """
    bins, covered, temperatures = [], [], []
    for against, parts in errors.items():
        temperature = fit_temperature(*parts["held_out"])
        deviations, variances = parts["evaluation"]
        correlation = rank_correlation(deviations, variances)
        temperatures.append({"against": against, "temperature": temperature,
                             "rank_correlation": correlation.value, "low": correlation.low,
                             "high": correlation.high})  # fmt: skip
        for repaired, factor in ((False, 1.0), (True, temperature**2)):
            label = {"against": against, "repaired": repaired}
            bins.append(error_by_deviation(deviations, factor * variances).assign(**label))
            covered.append(coverage(deviations, factor * variances).assign(**label))
    return (
        pd.concat(bins, ignore_index=True),
        pd.concat(covered, ignore_index=True),
        pd.DataFrame(temperatures),
    )


# --- the world --------------------------------------------------------------------------------------


def world_table(seed: int, prompts: Sequence[str], responses: Sequence[str]) -> pd.DataFrame:
    """Return gold reward and annotators' variance of responses in the three settings of a world."""
    tables = []
    for setting in SLOPES:
        world = World(seed, setting)
        gold, variance = (world.gold(prompts, responses), world.disagreement_variance(prompts, responses))
        correlation = float(spearmanr(gold, variance).statistic)
        tables.append(
            pd.DataFrame({"setting": setting, "gold": gold, "variance": variance, "correlation": correlation})
        )
    return pd.concat(tables, ignore_index=True)


def reference_table(world: World, references: Mapping[str, Path], count: int, seed: int) -> pd.DataFrame:
    """Return how reference policies fare: a row per architecture, temperature and category."""
    prompts = world.prompts(count, np.random.default_rng(seed))
    rows = []
    for architecture, folder in references.items():
        for temperature in (1.0, 1.5):
            answers = sample_reference(folder, prompts, seed, temperature)
            table = world.assess(prompts, answers).groupby("category", sort=False)
            rows.append(
                table.mean(numeric_only=True)
                .assign(gold_sd=table["gold"].std(), policy=f"{architecture}-like, T = {temperature:g}")
                .reset_index()
            )
    return pd.concat(rows, ignore_index=True)


def selection_table(
    study: RewardStudy,
    reference: Path,
    ensembles: Mapping[str, Heads],
    judges: Mapping[str, SimulatedJudge],
    seed: int,
) -> pd.DataFrame:
    """Return what best-of-n and the exponential tilt gain by each proxy over a reference policy."""
    world, sizes = World(study.seed), study.profile.reference
    prompts = world.prompts(sizes.prompts, np.random.default_rng(seed))
    asked = [prompt for prompt in prompts for _ in range(sizes.samples)]
    answers = sample_reference(reference, asked, seed)
    shape = (sizes.prompts, sizes.samples)
    model, tokenizer = load_reward_model(study.reward_model)
    ids = conversation_ids(tokenizer, asked, answers, longest(model, study.settings.max_length))
    features, single = features_and_scores(model, ids)
    proxies = {"gold reward": world.gold(asked, answers)}
    proxies["reward model"] = single.double().numpy()
    for name, heads in ensembles.items():
        proxies[name] = heads.scores(features)[0].mean(0).double().numpy()
    everyone = np.zeros(len(asked), dtype=np.int64)
    for name, judge in judges.items():
        proxies[name] = judge.judge(asked, answers, everyone).midpoint()
    category = world.assess(prompts, answers[:: sizes.samples])["category"].to_numpy()
    shaped = {name: values.reshape(shape) for name, values in proxies.items()}
    ns = tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= sizes.samples)
    return gains(shaped, shaped["gold reward"], category, ns=ns)


def persistence_table(
    judge: SimulatedJudge, prompts: Sequence[str], responses: Sequence[str], judges: int, queries: int
) -> pd.DataFrame:
    """Return the variance over judges of each text's mean reward, asked `queries` times.

    A fresh judge draws anew for every query, so its mean forgets; a persistent one answers alike.
    """
    persistent = PersistentJudges(judge, judge.world.features, seed=judge.world.seed)
    return _variance_over_judges(judge, persistent, prompts, responses, judges, queries)


def _variance_over_judges(
    fresh: RewardSource,
    persistent: RewardSource,
    prompts: Sequence[str],
    responses: Sequence[str],
    judges: int,
    queries: int,
) -> pd.DataFrame:
    random = np.random.default_rng(0)
    texts = len(prompts)
    asked = [text for text in prompts for _ in range(judges)]
    answers = [text for text in responses for _ in range(judges)]
    policy = np.tile(np.arange(judges), texts)
    columns = {}
    for name, source in (("fresh", fresh), ("persistent", persistent)):
        judgement = source.judge(asked, answers, policy)
        draws = [judgement.sample(random.random(len(asked))) for _ in range(queries)]
        columns[name] = np.mean(draws, axis=0).reshape(texts, judges).var(1, ddof=1)
        assert isinstance(judgement, Interval)
        columns["interval"] = judgement.variance().reshape(texts, judges)[:, 0]
    return pd.DataFrame(columns)


def novelty_table(
    study: RewardStudy, ensembles: Mapping[str, Heads], kinds: Mapping[str, Mapping[str, Scores]], seed: int
) -> pd.DataFrame:
    """Return variances on the world's responses and on strings of digits, over the reward's variance."""
    world, pairs = World(study.seed), study.part("evaluation")
    strings = world.digit_strings(len(pairs), np.random.default_rng(seed))
    model, tokenizer = load_reward_model(study.reward_model)
    length = longest(model, study.settings.max_length)
    ids = conversation_ids(tokenizer, pairs["prompt"].tolist(), strings, length)
    features, _ = features_and_scores(model, ids)
    rows = []
    for name, heads in ensembles.items():
        scores = kinds[name]["evaluation"]
        unit = np.concatenate([scores.chosen.mean(1), scores.rejected.mean(1)]).var()
        outside = sample_variance(heads.scores(features)[0].T.double().numpy())
        inside = np.median(sample_variance(scores.chosen))
        rows.append({"kind": name, "inside": inside / unit, "outside": np.median(outside) / unit})
    return pd.DataFrame(rows)


def ratings_table(
    study: RewardStudy, ensembles: Mapping[str, Heads], ratings: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """Return variances between models and between people for rated responses, and their correlation.

    Responses that the model cannot read whole are left out; a line of the log says how many.
    """
    model, tokenizer = load_reward_model(study.reward_model)
    length = longest(model, study.settings.max_length)
    rows = fitting_ids(tokenizer, ratings["prompt"].tolist(), ratings["response"].tolist(), length)
    ids = [row for row in rows if row is not None]
    if len(ids) < len(rows):
        _LOG.warning("%d rated responses are longer than %d tokens", len(rows) - len(ids), length)
        ratings = ratings[[row is not None for row in rows]]
    features, _ = features_and_scores(model, ids, "features, ratings")
    people = np.array([np.var(row, ddof=1) for row in ratings["ratings"]])
    tables, texts = [], []
    for name, heads in ensembles.items():
        models = sample_variance(heads.scores(features)[0].T.double().numpy())
        found = rank_correlation(np.sqrt(people), models)
        texts.append(f"ρ = {found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}], n = {found.count}")
        tables.append(pd.DataFrame({"kind": name, "models": models, "people": people}))
    return pd.concat(tables, ignore_index=True), texts
