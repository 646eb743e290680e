"""The tables of notebook 03: what ensembles of each kind disagree about, and whether that is right."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import shapiro, spearmanr, ttest_1samp
from torch import Tensor

from vaalign_lib.data.pairs import accuracy_by_category
from vaalign_lib.data.world.world import SLOPES, World
from vaalign_lib.experiments.reward_models import RewardStudy
from vaalign_lib.models import fitting_ids
from vaalign_lib.policies.best_of_n import gains
from vaalign_lib.policies.reference_pairs import TEMPERATURE, sample_reference
from vaalign_lib.profiles import HeadTraining
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
from vaalign_lib.rewards.classifier import SIDES, TINY, reader
from vaalign_lib.rewards.heads import HeadKind, Heads, steps_of
from vaalign_lib.rewards.simulated_judge import PersistentJudges, SimulatedJudge
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, mean, proportion

_LOG = logging.getLogger(__name__)
Questions = Mapping[str, tuple[Array, Array]]  # by part: errors, and the variances predicted for them
PAPER = "the paper's recipe"
BACKBONES = "separate small backbones"
TRAINED: dict[HeadKind, str] = {  # trained longer, with larger steps, and their names in tables
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

    @property
    def reward_variance(self) -> float:
        """Variance of the mean reward over all responses: the square of the reward's unit."""
        return float(np.concatenate([self.chosen.mean(1), self.rejected.mean(1)]).var())


Kinds = Mapping[str, Mapping[str, Scores]]  # by kind of ensemble and part of the pairs


def scores_of_heads(heads: Heads, features: Mapping[str, Tensor]) -> Scores:
    """Return what the first ensemble of a grid of heads says about pairs."""
    return Scores(*(_scored(heads, features[side]) for side in SIDES))


def _scored(heads: Heads, features: Tensor) -> Array:
    """Return the scores of features by the first ensemble of a grid (responses, members)."""
    return np.asarray(heads.scores(features)[0].T.double().numpy())


def ensembles_of(study: RewardStudy) -> dict[str, Heads]:
    """Return one ensemble of heads of every kind."""
    sizes = study.profile.ensembles
    paper, _ = study.heads("paper", sizes.paper, keep_first=True)
    return {PAPER: paper} | {name: study.heads(kind, sizes.trained)[0] for kind, name in TRAINED.items()}


def all_kinds(study: RewardStudy) -> dict[str, dict[str, Scores]]:
    """Return the scores of one ensemble of every kind, by kind and part."""
    features = {part: study.features(part) for part in ("held_out", "evaluation")}
    scores = {
        name: {part: scores_of_heads(heads, known) for part, known in features.items()}
        for name, heads in ensembles_of(study).items()
    }
    if study.backbone == TINY:  # separate backbones are trained in the tiny architecture only
        found = {part: study.backbones(part) for part in features}
        scores[BACKBONES] = {
            part: Scores(*(f[side].double().numpy() for side in SIDES)) for part, f in found.items()
        }
    return scores


# --- the reward model -------------------------------------------------------------------------------


def accuracy_table(study: RewardStudy) -> pd.DataFrame:
    """Return how often the reward model of stage 1 ranks pairs as labelled, and as the gold reward."""
    pairs, features = study.part("evaluation"), study.features("evaluation")
    gap = (features["chosen_score"] - features["rejected_score"]).double().numpy()
    tables = [accuracy_by_category(pairs, gap > 0).assign(against="labels")]
    if study.embedded:
        correct, counted = ranked_rightly(gap, pairs)
        table = accuracy_by_category(pairs[counted], correct[counted])
        tables.append(table.assign(against="gold reward"))
    return pd.concat(tables, ignore_index=True)


def ranked_rightly(gap: Array, pairs: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which pairs are ranked as the gold reward, or the label, does, and which it does not tie."""
    if "gold_chosen" not in pairs:
        return gap > 0, np.ones(len(gap), dtype=bool)
    gold = (pairs["gold_chosen"] - pairs["gold_rejected"]).to_numpy()
    return np.sign(gap) == np.sign(gold), gold != 0


# --- disagreement -----------------------------------------------------------------------------------


def figure_8_table(study: RewardStudy, scores: Scores) -> pd.DataFrame:
    """Return the variances of Figure 8, a row per pair; `..._fresh` are without the first, stage 1's."""
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
    """Return variances along training for the paper's recipe and for longer training with larger steps, a
    row per recipe and step, and the heads of the paper's recipe by step.
    """
    features, sizes = study.features("evaluation"), study.profile.ensembles
    recipes: dict[str, tuple[HeadKind, HeadTraining, bool]] = {
        PAPER: ("paper", sizes.paper, True),
        "same data, larger steps": ("paper", sizes.trained, False),
        "bootstrap samples, larger steps": ("bootstrap", sizes.trained, False),
    }
    rows, copies = [], {}
    for recipe, (kind, settings, keep_first) in recipes.items():
        last = steps_of(settings, len(study.part("train")))
        steps = sorted({0, *np.geomspace(1, last, points).astype(int).tolist(), last})
        _, copies[recipe] = study.heads(kind, settings, snapshots=steps, keep_first=keep_first)
        for step, heads in copies[recipe].items():
            scores = scores_of_heads(heads, features)
            gaps = torch.as_tensor(scores.chosen - scores.rejected)
            variances = np.median(sample_variance(scores.chosen)), np.median(scores.gap_variance)
            rows.append([recipe, step, *variances, float(-torch.nn.functional.logsigmoid(gaps).mean())])
    columns = ["recipe", "step", "accepted", "difference", "loss"]
    return pd.DataFrame(rows, columns=columns), copies[PAPER]


def kinds_table(study: RewardStudy, kinds: Kinds) -> pd.DataFrame:
    """Return what tells the kinds apart, a row each.

    `relative_variance` is the median variance of accepted responses over that of the mean reward. Errors are
    of the gold reward; where there is none, `label_loss` is without and with the variances.
    """
    pairs, held_out = study.part("evaluation"), study.part("held_out")
    rows = []
    for kind, parts in kinds.items():
        scores, known = parts["evaluation"], parts["held_out"]
        correct, counted = ranked_rightly(scores.gap, pairs)
        if study.embedded:
            errors = gold_errors(parts, held_out, pairs)
            of_errors = rank_correlation(*errors["evaluation"]).columns("rank_correlation")
            of_errors["temperature"] = fit_temperature(*errors["held_out"])
        else:
            differing = known.gap_variance > 0  # not cut to the same tokens
            fitted = fit_temperature_to_labels(known.gap[differing], known.gap_variance[differing])
            of_errors = {
                "label_loss": label_loss(scores.gap, scores.gap_variance, 0),
                "label_loss_with_variance": label_loss(scores.gap, scores.gap_variance, fitted),
                "temperature": fitted,
            }
        row = {
            "kind": kind,
            "relative_variance": np.median(sample_variance(scores.chosen)) / scores.reward_variance,
            "difference_ratio": np.median(difference_ratio(scores.chosen, scores.rejected)),
        }
        rows.append(row | of_errors | proportion(correct[counted]).columns("accuracy"))
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


def dropping_table(study: RewardStudy, kinds: Kinds) -> pd.DataFrame:
    """Return accuracy once the pairs of largest variance are left out, a row per kind and share."""
    pairs, tables = study.part("evaluation"), []
    for kind, parts in kinds.items():
        scores = parts["evaluation"]
        correct, counted = ranked_rightly(scores.gap, pairs)
        table = accuracy_after_dropping(correct[counted], scores.gap_variance[counted])
        tables.append(table.assign(kind=kind))
    return pd.concat(tables, ignore_index=True)


# --- calibration ------------------------------------------------------------------------------------


def independent_gaps(heads: Heads, features: Mapping[str, Tensor]) -> Array:
    """Return every head's score of the chosen minus the rejected response (ensembles, members, pairs), for
    Bradley-Terry labels leave an ensemble's zero point open.
    """
    gaps = heads.scores(features["chosen"]) - heads.scores(features["rejected"])
    return gaps.double().numpy()


def spread_errors(gaps: Array) -> tuple[Array, Array]:
    """Return how far independent ensembles are from the mean of all, with what each says about itself, from
    gaps (ensembles, members, pairs). Pair k is judged by ensemble k modulo their number E; the deviation is
    enlarged by sqrt(E / (E - 1)), for the mean contains the ensemble itself.
    """
    ensembles, _, pairs = gaps.shape
    mean, rows = gaps.mean(1), np.arange(pairs)
    one = rows % ensembles
    error = (mean - mean.mean(0))[one, rows] * np.sqrt(ensembles / (ensembles - 1))
    variance = gaps.var(1, ddof=1)[one, rows]
    return error[variance > 0], variance[variance > 0]


def spread_correlations(gaps: Array) -> Array:
    """Return Spearman's correlation over pairs of each ensemble's variance with the spread between
    ensembles (ensembles,), from gaps (ensembles, members, pairs).
    """
    _, between = between_ensembles(gaps)
    return np.array([spearmanr(own, between).statistic for own in gaps.var(1, ddof=1)])


def assumption_tests(rewards: Array, truth: Array | None, seed: int) -> dict[str, Estimate]:
    """Test the three parts of Assumption 2.1 on the errors of independent ensembles' rewards.

    `independent`: the mean absolute correlation of two texts' errors, over random pairs of texts without
    overlap, divided by that of E independent normal ones, Gamma((E - 1) / 2) / (sqrt(pi) Gamma(E / 2)): 1 if
    they are. `unbiased`: the share of texts whose mean error differs from 0 at 5% (t test), against the
    straight line in the truth that is nearest to the mean reward; `gaussian`: the share whose errors Shapiro
    and Wilk's test rejects at 5%: 0.05 each if so. Intervals are over texts, given these ensembles.

    `rewards` (ensembles, texts), `truth` (texts,), None where it is not known: then without `unbiased`. Texts
    of which all ensembles say the same are left out.
    """
    differing = np.ptp(rewards, axis=0) > 0
    rewards = rewards[:, differing]
    ensembles, texts = rewards.shape
    scores = (rewards - rewards.mean(0)) / rewards.std(0)
    one, other = np.random.default_rng(seed).permutation(texts)[: texts // 2 * 2].reshape(2, -1)
    by_chance = np.exp(gammaln((ensembles - 1) / 2) - gammaln(ensembles / 2)) / np.sqrt(np.pi)
    found = {"independent": mean(np.abs((scores[:, one] * scores[:, other]).mean(0)) / by_chance)}
    if truth is not None:
        line = np.polyval(np.polyfit(truth[differing], rewards.mean(0), 1), truth[differing])
        found["unbiased"] = proportion(ttest_1samp(rewards - line, 0).pvalue < 0.05)
    return found | {"gaussian": proportion(shapiro(scores, axis=0).pvalue < 0.05)}


def calibration_tables(errors: Mapping[str, Questions]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return error by deviation and coverage of each question's `evaluation` errors, before and after the
    repair by a temperature that the `held_out` ones fit; and these temperatures.
    """
    bins, covered, temperatures = [], [], []
    for against, parts in errors.items():
        temperature = fit_temperature(*parts["held_out"])
        deviations, variances = parts["evaluation"]
        found = rank_correlation(deviations, variances)
        row = {"against": against, "temperature": temperature, "rank_correlation": found.value}
        temperatures.append(row | {"low": found.low, "high": found.high})
        for repaired, factor in ((False, 1.0), (True, temperature**2)):
            told = {"against": against, "repaired": repaired}
            bins.append(error_by_deviation(deviations, factor * variances).assign(**told))
            covered.append(coverage(deviations, factor * variances).assign(**told))
    tables = [pd.concat(one, ignore_index=True) for one in (bins, covered)]
    return tables[0], tables[1], pd.DataFrame(temperatures)


def members_calibration(
    study: RewardStudy, kinds: Kinds, kind: str, members: int
) -> tuple[Array, pd.DataFrame, pd.DataFrame]:
    """Return the variances (pairs,) of the first members of a kind of ensemble in the gold reward's unit,
    their errors against it by deviation, and their coverage.
    """
    parts = kinds[kind].items()
    asked = {part: Scores(one.chosen[:, :members], one.rejected[:, :members]) for part, one in parts}
    errors = gold_errors(asked, study.part("held_out"), study.part("evaluation"))
    bins, covered, _ = calibration_tables({"the true reward": errors})
    return errors["evaluation"][1], bins, covered


# --- the world --------------------------------------------------------------------------------------


def world_table(seed: int, prompts: Sequence[str], responses: Sequence[str]) -> pd.DataFrame:
    """Return gold reward and annotators' variance of responses in the three settings of a world."""
    tables = []
    for setting in SLOPES:
        world = World(seed, setting)
        gold, variance = world.gold(prompts, responses), world.disagreement_variance(prompts, responses)
        table = pd.DataFrame({"setting": setting, "gold": gold, "variance": variance})
        tables.append(table.assign(correlation=float(spearmanr(gold, variance).statistic)))
    return pd.concat(tables, ignore_index=True)


def reference_table(world: World, references: Mapping[str, Path], count: int, seed: int) -> pd.DataFrame:
    """Return how reference policies fare: a row per architecture, temperature and category."""
    prompts = world.prompts(count, np.random.default_rng(seed))
    rows = []
    for architecture, folder in references.items():
        for temperature in (1.0, TEMPERATURE):
            answers = sample_reference(folder, prompts, seed, temperature)
            table, policy = world.assess(prompts, answers), f"{architecture}-like, T = {temperature:g}"
            groups = table.groupby("category", sort=False)
            means = groups.mean(numeric_only=True).assign(gold_sd=groups["gold"].std(), policy=policy)
            rows.append(means.reset_index())
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
    features, single = study.read(asked, answers)
    proxies = {"gold reward": world.gold(asked, answers), "reward model": single.double().numpy()}
    proxies |= {name: heads.scores(features)[0].mean(0).double().numpy() for name, heads in ensembles.items()}
    everyone = np.zeros(len(asked), dtype=np.int64)
    proxies |= {name: one.judge(asked, answers, everyone).midpoint() for name, one in judges.items()}
    category = world.assess(prompts, answers[:: sizes.samples])["category"].to_numpy()
    shaped = {name: values.reshape(sizes.prompts, sizes.samples) for name, values in proxies.items()}
    ns = tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= sizes.samples)
    return gains(shaped, shaped["gold reward"], category, ns=ns)


def persistence_table(
    judge: SimulatedJudge, prompts: Sequence[str], responses: Sequence[str], judges: int, queries: int
) -> pd.DataFrame:
    """Return the variance over judges of each text's mean reward, asked `queries` times: of fresh ones, which
    draw anew for every query, and of persistent ones, which answer alike.
    """
    persistent = PersistentJudges(judge, judge.world.features, seed=judge.world.seed)
    random = np.random.default_rng(0)
    asked, answers = np.repeat(prompts, judges).tolist(), np.repeat(responses, judges).tolist()
    policy = np.tile(np.arange(judges), len(prompts))
    columns = {}
    for name, source in (("fresh", judge), ("persistent", persistent)):
        judgement = source.judge(asked, answers, policy)
        draws = [judgement.sample(random.random(len(asked))) for _ in range(queries)]
        columns[name] = np.mean(draws, axis=0).reshape(-1, judges).var(1, ddof=1)
        columns["interval"] = judgement.variance()[::judges]
    return pd.DataFrame(columns)


def novelty_table(
    study: RewardStudy, ensembles: Mapping[str, Heads], kinds: Kinds, seed: int
) -> pd.DataFrame:
    """Return variances on the world's responses and on strings of digits, over the reward's variance."""
    pairs = study.part("evaluation")
    strings = World(study.seed).digit_strings(len(pairs), np.random.default_rng(seed))
    features, _ = study.read(pairs["prompt"].tolist(), strings)
    rows = []
    for name, heads in ensembles.items():
        scores = kinds[name]["evaluation"]
        outside = np.median(sample_variance(_scored(heads, features)))
        inside, unit = np.median(sample_variance(scores.chosen)), scores.reward_variance
        rows.append({"kind": name, "inside": inside / unit, "outside": outside / unit})
    return pd.DataFrame(rows)


def ratings_table(
    study: RewardStudy, ensembles: Mapping[str, Heads], ratings: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """Return variances between models and between people for rated responses, and their correlation.

    Responses that the model cannot read whole are left out; a line of the log says how many.
    """
    tokenizer, length = reader(str(study.reward_model), study.settings.max_length)
    rows = fitting_ids(tokenizer, ratings["prompt"].tolist(), ratings["response"].tolist(), length)
    fits = [row is not None for row in rows]
    if not all(fits):
        _LOG.warning("%d rated responses are longer than %d tokens", fits.count(False), length)
    ratings = ratings[fits]
    features, _ = study.read(ratings["prompt"].tolist(), ratings["response"].tolist(), "features, ratings")
    people = np.array([np.var(row, ddof=1) for row in ratings["ratings"]])
    tables, told = [], []
    for name, heads in ensembles.items():
        models = sample_variance(_scored(heads, features))
        found = rank_correlation(np.sqrt(people), models)
        told.append(f"ρ = {found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}], n = {found.count}")
        tables.append(pd.DataFrame({"kind": name, "models": models, "people": people}))
    return pd.concat(tables, ignore_index=True), told
