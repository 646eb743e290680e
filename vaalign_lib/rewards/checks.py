"""Questions to a reward model whose answers are known where all is well: what people trip over with them.

A reward model is a folder of a sequence classifier, or of an ensemble of heads that was saved here. Findings
name the rules of data/reward_rules.yaml by which they are judged.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jinja2 import TemplateError
from scipy.special import expit
from scipy.stats import binomtest, chi2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.jobs import device
from vaalign_lib.models import fitting_ids
from vaalign_lib.papers.printed import Finding
from vaalign_lib.rewards.calibration import (
    difference_ratio,
    fit_temperature,
    rank_correlation,
    sample_variance,
)
from vaalign_lib.rewards.classifier import SIDES, features_and_scores, loaded, longest, padded, with_segments
from vaalign_lib.rewards.ensemble import load_ensemble
from vaalign_lib.rewards.heads import Heads
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import TAILS, Estimate, Z, bca, holm, mean, median, proportion, spearman

SAMPLE, BATCH = 32, 8  # conversations whose padding is looked at, and how many are padded together
DTYPE_PAIRS = 100  # that are scored in other precisions
LEAST = 5  # pairs or responses, of which something is said
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Ids = Sequence[Sequence[int] | None]
Sides = Mapping[str, Array]  # by side, `chosen` and `rejected`: (pairs, members)


@dataclass(frozen=True)
class Reader:
    """A reward model that is loaded, with the heads of an ensemble if it is one."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    missing: list[str]  # weights that are in no file
    heads: Heads | None
    max_length: int

    @classmethod
    def of(cls, folder: Path, max_length: int, dtype: torch.dtype = torch.float32) -> "Reader":
        """Load a folder."""
        ensemble = load_ensemble(folder) if (folder / "ensemble.json").is_file() else None
        where = folder if ensemble is None else folder / "backbone"
        options = {"dtype": dtype, "device_map": {"": device()}}
        model, tokenizer, missing = loaded(str(folder), str(where), **options)
        heads = None
        if ensemble is not None:
            heads, max_length = ensemble.heads, min(max_length, ensemble.max_length)
        return cls(folder, with_segments(model.eval(), tokenizer), tokenizer, missing, heads, max_length)

    @property
    def length(self) -> int:
        """How many tokens it reads at most."""
        return longest(self.model, self.max_length)

    def ids(self, prompts: Sequence[str], responses: Sequence[str]) -> Ids:
        """Return the tokens of conversations, None for responses that do not fit."""
        return fitting_ids(self.tokenizer, list(prompts), list(responses), self.length)

    def scores(self, ids: Ids) -> Array:
        """Return its members' scores of conversations (conversations, members), NaN where there is none."""
        known = [row for row in ids if row is not None]
        features, own = features_and_scores(self.model, known)
        everyone = torch.zeros(len(known), dtype=torch.long)
        found = own[:, None] if self.heads is None else self.heads.own_scores(features, everyone)
        scores = np.full((len(ids), found.shape[1]), np.nan)
        scores[[row is not None for row in ids]] = found.double().numpy()
        return scores

    @torch.no_grad()
    def padded_scores(self, ids: Sequence[Sequence[int]], side: str) -> Array:
        """Return the model's own scores of one batch (conversations,), padded on a side, as transformers
        gives them; infinite where it gives none.
        """
        table, lengths = padded(ids, self.tokenizer.pad_token_id or 0)
        mask = (torch.arange(table.shape[1]) < lengths[:, None]).long()
        if side == "left":
            shifts = (table.shape[1] - lengths).tolist()
            moved = ([row.roll(by) for row, by in zip(one, shifts, strict=True)] for one in (table, mask))
            table, mask = map(torch.stack, moved)
        where = self.model.device
        try:
            found = self.model(input_ids=table.to(where), attention_mask=mask.to(where)).logits
        except ValueError:  # transformers wants a padding token for several rows
            return np.full(len(ids), np.inf)
        return found[:, 0].double().cpu().numpy()


def _exactly(rule: str, value: float, text: str) -> Finding:
    value = value if np.isfinite(value) else float("inf")
    return Finding(rule=rule, reproduced=text, value=value, low=value, high=value)


def _interval(rule: str, found: Estimate, text: str = "") -> Finding:
    return Finding(rule=rule, reproduced=text or str(found), **vars(found))


def _holds(rule: str, holds: bool, text: str) -> Finding:
    return Finding(rule=rule, reproduced=text, holds=holds)


# --- of a model -----------------------------------------------------------------------------------------


def readable_findings(reader: Reader, ids: Ids) -> list[Finding]:
    """Return what must hold for scores to mean anything."""
    outputs, named = reader.model.config.num_labels, ", ".join(reader.missing)
    told = f"not in the files: {named}; " if named else ""
    bad = [name for name, one in reader.model.state_dict().items() if not one.isfinite().all()]
    words = reader.model.get_input_embeddings().weight.shape[0]
    largest = max((max(row) for row in ids if row), default=0)
    return [
        _holds("weights.present", outputs == 1 and not named, f"{told}outputs: {outputs}"),
        _holds("weights.finite", not bad, f"not finite: {', '.join(bad)}" if bad else "all are"),
        _holds("tokens.known", largest < words, f"largest token {largest}, embeddings {words}"),
    ]


def model_findings(reader: Reader, table: pd.DataFrame, scores: Sides) -> list[Finding]:
    """Return what is found about a model by its scores of pairs that it can read."""
    sides = [reader.ids(table["prompt"], table[side]) for side in SIDES]
    ids = [row for side in sides for row in side if row is not None]
    flat = np.concatenate([scores[side].mean(1) for side in SIDES])
    spread, largest, centre = float(flat.std()), float(np.abs(flat).max()), mean(flat)
    ends = sorted(np.abs([centre.low, centre.high]) / (spread or 1.0))
    nearest = 0.0 if centre.low <= 0 <= centre.high else ends[0]
    away = Estimate(abs(centre.value) / (spread or 1.0), float(nearest), float(ends[1]), centre.count)
    told = f"standard deviation {spread:.3g}, from {flat.min():.3g} to {flat.max():.3g}"
    return [
        _padding(reader),
        *_batches(reader, ids, spread),
        _end(reader.tokenizer, ids),
        *_template(reader.tokenizer, table),
        *(_dtype(reader, name, sides, scores) for name in DTYPES),
        _exactly("scale.spread", spread / (largest or 1.0), told),
        _interval("scale.centre", away, f"mean {centre}, standard deviation {spread:.3g}"),
    ]


def _padding(reader: Reader) -> Finding:
    tokenizer, own = reader.tokenizer, reader.model.config.get_text_config().pad_token_id
    told = f"tokenizer {tokenizer.pad_token_id} ({tokenizer.pad_token}), model {own}"
    apart = tokenizer.pad_token_id != tokenizer.eos_token_id
    good = apart and tokenizer.pad_token_id is not None and own == tokenizer.pad_token_id
    return _holds("padding.own", good, told if apart else f"{told}; it is the end token, too")


def _batches(reader: Reader, ids: Sequence[Sequence[int]], spread: float) -> Iterator[Finding]:
    """Compare scores alone with those in batches of conversations of different lengths."""
    order = np.argsort([len(row) for row in ids], kind="stable")
    order = order[np.linspace(0, len(ids) - 1, min(SAMPLE, len(ids))).astype(int)]
    step = -(-len(order) // BATCH)
    groups = [[ids[k] for k in order[first::step]] for first in range(step)]
    own = reader.tokenizer.padding_side
    alone = np.concatenate([reader.padded_scores([row], own) for group in groups for row in group])
    for rule, side in (("batch", own), ("other_side", "left" if own == "right" else "right")):
        together = np.concatenate([reader.padded_scores(group, side) for group in groups])
        change = float(np.abs(together - alone).max() / (spread or 1.0))
        gives = f"{change:.2g} SDs" if np.isfinite(change) else "no scores: the model has no padding token"
        yield _exactly(
            f"padding.{rule}", change, f"{gives}, padded on the {side}, {len(alone)} conversations"
        )


def _end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> Finding:
    """Look for a special token in what all conversations end with."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    shared: list[int] = []
    for last in zip(*(reversed(row) for row in ids), strict=False):
        if len(set(last)) > 1:
            break
        shared.append(last[0])
    marks = tokenizer.convert_ids_to_tokens([one for one in shared if one in special])
    return _holds("end.marked", bool(marks), f"all end with {marks[0]}" if marks else "no token does")


def _template(tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame) -> Iterator[Finding]:
    """Look at what the chat template makes of the texts, if there is one."""
    if tokenizer.chat_template is None:
        return
    changed, doubled, begin = {"prompt": 0, "response": 0}, 0, tokenizer.bos_token_id
    for said in zip(table["prompt"], table["chosen"], strict=True):
        roles = zip(("user", "assistant"), said, strict=True)
        turns = [{"role": role, "content": text} for role, text in roles]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except (TemplateError, TypeError, ValueError) as error:
            yield _holds(
                "template.whole", False, f"it cannot write this: {' '.join(str(error).split()):.160}"
            )
            return
        for name, one in zip(changed, said, strict=True):
            changed[name] += one.strip() not in text
        doubled += begin is not None and tokenizer(text)["input_ids"][:2] == [begin, begin]
    told = ", ".join(f"{name} changed in {n}" for name, n in changed.items())
    yield _holds("template.whole", not any(changed.values()), f"{told} of {len(table)}")
    yield _holds("template.once", not doubled, f"twice in {doubled} of {len(table)}")


def length_finding(reader: Reader, table: pd.DataFrame) -> Finding:
    """Return the share of all conversations that the model reads whole."""
    texts = [*table["prompt"], *table["prompt"]], [*table["chosen"], *table["rejected"]]
    rows = fitting_ids(reader.tokenizer, *texts, 10**9)
    fits = np.array([row is not None and len(row) <= reader.length for row in rows])
    told = f"{(~fits).sum()} of {fits.size} are longer than the {reader.length} tokens that it reads"
    return _interval("length.fits", proportion(fits), told)


def _dtype(reader: Reader, name: str, sides: Sequence[Ids], scores: Sides) -> Finding:
    """Compare differences between responses in another precision with those in float32."""
    other = Reader.of(reader.folder, reader.max_length, DTYPES[name])
    rough = [other.scores(ids[:DTYPE_PAIRS]).mean(1) for ids in sides]
    gaps = (scores["chosen"] - scores["rejected"])[:DTYPE_PAIRS].mean(1)
    differences = rough[0] - rough[1]
    if share := float(np.mean(~np.isfinite(differences))):
        return _exactly(f"dtype.{name}", np.inf, f"no finite score in {share:.0%} of {gaps.size} pairs")

    def relative(both: Array) -> Array:
        errors, exact = both
        return np.sqrt((errors**2).mean(-1)) / np.maximum(np.median(np.abs(exact), axis=-1), 1e-300)

    value, low, high = map(float, bca([np.stack([differences - gaps, gaps])], relative, resamples=2000))
    found = Estimate(value, *((low, high) if low <= high else (value, value)), gaps.size)
    turned = float((np.sign(differences) != np.sign(gaps)).mean())
    text = f"{found} median differences; {turned:.1%} of pairs change their order"
    return _interval(f"dtype.{name}", found, text)


# --- of scores ------------------------------------------------------------------------------------------


def score_findings(table: pd.DataFrame, scores: Sides) -> list[Finding]:
    """Return what is found about all members' scores of pairs, labelled ones if they have a `subset`."""
    found: list[Finding] = list(_members(scores)) if scores["chosen"].shape[1] > 1 else []
    gap = (scores["chosen"] - scores["rejected"]).mean(1)
    longer = (table["chosen"].str.len() - table["rejected"].str.len()).to_numpy()  # in characters
    if np.ptp(gap) > 0 and np.ptp(longer) > 0:
        found.append(_interval("length.rewarded", spearman(gap, longer)))
    if "subset" not in table:
        return found
    found.append(_interval("accuracy.all", proportion(gap > 0)))
    parts = pd.Series(gap > 0).groupby(table["subset"].to_numpy()).agg(["sum", "size"])
    p_values = [binomtest(int(k), int(n), 0.5, "less").pvalue for k, n in parts.to_numpy()]
    below = parts.index[holm(p_values) < 0.05].tolist()
    told = f"worse than chance: {', '.join(below)}" if below else f"none of {len(parts)}"
    found.append(_holds("accuracy.subsets", not below, told))
    if (longer < 0).sum() >= LEAST:
        found.append(_interval("accuracy.shorter", proportion(gap[longer < 0] > 0)))
    if np.isfinite((slope := label_slope(gap)).value):
        told = f"labels are likeliest with scores times {slope}"
        found.append(_interval("scale.labels", times_off(slope), told))
    return found


def _members(scores: Sides) -> Iterator[Finding]:
    everything = np.concatenate([scores[side] for side in SIDES])
    spread = everything.mean(1).std() or 1.0
    yield _interval("members.spread", median(everything.std(1, ddof=1) / spread))
    varying = (sample_variance(scores["chosen"]) + sample_variance(scores["rejected"])) > 0
    if varying.sum() > LEAST:
        yield _interval("members.order", median(difference_ratio(*(scores[side][varying] for side in SIDES))))


def times_off(factor: Estimate) -> Estimate:
    """Return by how many times a factor is off, whichever way: 1 for a factor of 1."""
    value, low, high = np.log([factor.value, factor.low, factor.high])
    near, far = sorted(np.abs([low, high]))
    found, near, far = np.exp([abs(value), 0 if low <= 0 <= high else near, far]).tolist()
    return Estimate(found, near, far, factor.count)


def label_slope(gap: Array) -> Estimate:
    """Return the factor on differences (pairs,) that makes the labels likeliest, by sigmoid(factor * gap).

    The interval is that of its logarithm by the observed information; NaN where no positive factor is best.
    """
    slope, unknown = 1.0 / (np.abs(gap).mean() or 1.0), Estimate(np.nan, np.nan, np.nan, gap.size)
    for _ in range(200):  # Newton's steps, no longer than to half and to twice
        share = expit(-slope * gap)
        information = float((gap**2 * share * (1 - share)).sum())
        if information <= 0:
            return unknown
        step = float((gap * share).sum()) / information
        if abs(step) < 1e-9 * slope:
            half = Z / (slope * np.sqrt(information))
            return Estimate(slope, float(slope * np.exp(-half)), float(slope * np.exp(half)), gap.size)
        slope = float(np.clip(slope + step, slope / 2, 2 * slope))
    return unknown


def rating_findings(scores: Array, ratings: Sequence[Sequence[float]]) -> list[Finding]:
    """Return what is found about scores (responses, members) against several people's ratings.

    The straight line that is nearest to the mean ratings turns scores into their unit. An error against them
    has the members' variance, in that unit, and that of the mean over people.
    """
    people = np.array([np.mean(one) for one in ratings])
    own = np.array([np.var(one, ddof=1) / len(one) for one in ratings])
    reward = scores.mean(1)
    if people.size < LEAST or np.ptp(reward) == 0 or np.ptp(people) == 0:
        return []
    found = [_interval("ratings.rank", spearman(reward, people))]
    if scores.shape[1] > 1:
        line = np.polyfit(reward, people, 1)
        errors, stated = people - np.polyval(line, reward), line[0] ** 2 * sample_variance(scores)
        if (count := int((kept := stated > 0).sum())) >= LEAST and np.ptp(stated[kept]) > 0:
            found.append(_interval("variance.rank", rank_correlation(errors[kept], stated[kept])))
            factor = fit_temperature(errors[kept], (stated + own)[kept])
            ends = factor * np.sqrt(count / chi2.ppf(TAILS[::-1], count))
            size = Estimate(factor, float(ends[0]), float(ends[1]), count)
            found.append(_interval("variance.size", times_off(size), f"errors are {size} stated deviations"))
    return found
