"""`vaalign check-reward`: reward models are asked what people trip over, and judged by rules."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from vaalign_lib.data.pairs import accuracy_by_category, read_pairs, read_ratings
from vaalign_lib.data.world.world import World
from vaalign_lib.papers.printed import Criterion, Finding, is_met
from vaalign_lib.rewards.checks import (
    LEAST,
    Reader,
    length_finding,
    model_findings,
    rating_findings,
    readable_findings,
    score_findings,
)
from vaalign_lib.rewards.classifier import SIDES
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import proportion
from vaalign_lib.store import DATA, write_atomically

RULES = DATA / "reward_rules.yaml"
UNLABELLED = 200  # pairs of responses of the embedded world, where no pairs are given
VERDICTS = ("passed", "warned", "failed", "unclear", "not measured")


class RewardRule(BaseModel):
    """A question to reward models, and how its answer is judged; see data/reward_rules.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    about: Literal["model", "scores"]
    claim: str
    criterion: Criterion
    remedy: str
    stops: bool = False

    def verdict(self, finding: Finding | None) -> str:
        """Judge an answer: a word of `VERDICTS`."""
        if finding is None:
            return "not measured"
        met = is_met(self.criterion, finding)
        return "unclear" if met is None else "passed" if met else "failed" if self.stops else "warned"

    def row(self, model: str, finding: Finding | None) -> dict[str, Any]:
        """Return the rule with its answer by a model, as a row of `Checked.rows`."""
        numbers = {"holds", "value", "low", "high", "count"}
        answer = finding.model_dump(include=numbers) if finding else dict.fromkeys(numbers)
        kind, threshold = self.criterion.kind, self.criterion.threshold
        expected = kind if threshold is None else f"{kind} {threshold:g}"
        told = {"model": model, "rule": self.id, "verdict": self.verdict(finding)}
        told |= {"found": finding.reproduced if finding else "", "expected": expected}
        return told | {"claim": self.claim, "remedy": self.remedy} | answer


def read_rules(path: str | Path = RULES) -> list[RewardRule]:
    """Read rules; ValueError if a file holds something else."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return TypeAdapter(list[RewardRule]).validate_python(content)


@dataclass(frozen=True)
class Checked:
    """What was found about reward models: a row for each rule and model, and tables by name."""

    texts: str  # where they are from
    rows: pd.DataFrame
    tables: dict[str, pd.DataFrame]

    @property
    def passed(self) -> bool:
        """Whether no rule failed that stops."""
        return not (self.rows["verdict"] == "failed").any()

    @property
    def in_words(self) -> str:
        """How many rules had which verdict."""
        counts = self.rows["verdict"].value_counts()
        return ", ".join(f"{counts[one]} {one}" for one in VERDICTS if one in counts)

    def write(self, folder: Path) -> list[Path]:
        """Write `check.json`, for programs, and `check.md`, for people."""
        content: dict[str, Any] = {"passed": self.passed, "texts": self.texts}
        content["rules"] = json.loads(self.rows.to_json(orient="records"))  # without NaN and infinity
        content["tables"] = {
            name: json.loads(one.to_json(orient="records")) for name, one in self.tables.items()
        }
        files = {"check.json": json.dumps(content, indent=1) + "\n", "check.md": self.markdown()}
        for name, text in files.items():
            write_atomically(folder / name, text)
        return [folder / name for name in files]

    def markdown(self) -> str:
        """Return the page: what to do about failures and warnings, then every rule, then the tables."""
        rows = self.rows.map(_cell)
        todo = [
            f"- **{row['rule']}** {row['verdict']}, {row['model']}: {row['found']}. Expected: {row['claim']} "
            f"({row['expected']}). To do: {row['remedy']}"
            for row in rows[rows["verdict"].isin(("failed", "warned"))].to_dict("records")
        ]
        asked = self.rows[["model", "rule", "verdict", "found", "expected", "claim"]]
        parts = [
            f"# Reward models: {'passed' if self.passed else 'failed'}",
            f"{self.in_words}; {self.texts}.",
        ]
        parts += ["\n".join(todo)] * bool(todo)
        for name, table in {"Every rule": asked, **self.tables}.items():
            parts += [f"## {name}", table.map(_cell).to_markdown(index=False, floatfmt=".3g")]
        return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> Any:
    """Return a value for Markdown, in which a token such as <s> is no markup."""
    if not isinstance(value, str):
        return value
    return escape(" ".join(value.split()), quote=False).replace("|", "\\|")


def texts_of(pairs: str | Path | None, limit: int) -> tuple[pd.DataFrame, str]:
    """Return at most so many pairs, chosen at random; without a source unlabelled responses of the embedded
    world, two to each prompt; and in words what they are.
    """
    random = np.random.default_rng(0)
    if pairs is not None:
        table = read_pairs(pairs)
        kept = np.sort(random.permutation(len(table))[:limit])
        return table.iloc[kept].reset_index(drop=True), f"{len(kept)} pairs of {pairs}"
    world, count = World(0), min(limit, UNLABELLED)
    prompts = world.prompts(count, random)
    sides = {side: world.responses(prompts, random.beta(2, 2, count), random) for side in SIDES}
    told = f"no pairs were given: {count} prompts of the embedded world, two unlabelled responses to each"
    return pd.DataFrame({"prompt": prompts, **sides}), told


def of_model(reader: Reader, table: pd.DataFrame) -> tuple[list[Finding], dict[str, Array]]:
    """Return what is found about one model, and its scores of pairs by side (pairs, members), NaN where a
    response does not fit; no scores where they would mean nothing.
    """
    ids = {side: reader.ids(table["prompt"], table[side]) for side in SIDES}
    found = [*readable_findings(reader, [*ids["chosen"], *ids["rejected"]]), length_finding(reader, table)]
    fits = np.array([None not in both for both in zip(*ids.values(), strict=True)])
    if not all(one.holds is not False for one in found) or fits.sum() < LEAST:
        return found, {}
    scores = {side: reader.scores(ids[side]) for side in SIDES}
    kept = {side: one[fits] for side, one in scores.items()}
    return found + model_findings(reader, table[fits], kept), scores


def check_rewards(
    folders: Sequence[str | Path],
    pairs: str | Path | None = None,
    ratings: str | Path | None = None,
    rules: str | Path = RULES,
    max_length: int = 4096,
    limit: int = 500,
) -> Checked:
    """Ask one reward model, or several as members of an ensemble, every question of the rules.

    `pairs` and `ratings` are read as by `data.pairs`; of both at most `limit`. Without pairs nothing is said
    of accuracy, without ratings nothing of whether the members' variance is right.
    """
    asked, (table, told) = read_rules(rules), texts_of(pairs, limit)
    rated = None if ratings is None else read_ratings(ratings).head(limit)
    found: dict[str, list[Finding]] = {}
    scored: list[dict[str, Array]] = []
    for folder in folders:
        reader = Reader.of(Path(folder), max_length)
        found[str(folder)], scores = of_model(reader, table)
        if rated is not None and scores:
            scores["rated"] = reader.scores(reader.ids(rated["prompt"], rated["response"]))
        scored.append(scores)
    everyone = "all members" if len(folders) > 1 else str(folders[0])
    tables: dict[str, pd.DataFrame] = {}
    if all(scored):
        joined = {name: np.concatenate([one[name] for one in scored], axis=1) for name in scored[0]}
        if (people := joined.pop("rated", None)) is not None and rated is not None:
            known = np.isfinite(people).all(1)
            found.setdefault(everyone, []).extend(rating_findings(people[known], rated["ratings"][known]))
        fits = np.all([np.isfinite(one).all(1) for one in joined.values()], axis=0)
        kept = {side: one[fits] for side, one in joined.items()}
        if fits.sum() >= LEAST:
            found.setdefault(everyone, []).extend(score_findings(table[fits], kept))
            tables = tables_of(table[fits], kept)
    rows = [
        rule.row(name, next((one for one in found.get(name, []) if one.rule == rule.id), None))
        for rule in asked
        for name in (map(str, folders) if rule.about == "model" else [everyone])
    ]
    return Checked(told, pd.DataFrame(rows), tables)


def tables_of(table: pd.DataFrame, scores: dict[str, Array]) -> dict[str, pd.DataFrame]:
    """Return tables of all members' scores of pairs (pairs, members), by name."""
    everything = np.concatenate([scores[side] for side in SIDES])
    of_members = {"mean": everything.mean(0), "deviation": everything.std(0), "lowest": everything.min(0),
                  "highest": everything.max(0)}  # fmt: skip
    found = {"Scores by member": pd.DataFrame(of_members).rename_axis("member").reset_index()}
    if "subset" not in table:
        return found
    right = pd.Series((scores["chosen"] - scores["rejected"]).mean(1) > 0, table.index)
    longer = np.sign(table["chosen"].str.len() - table["rejected"].str.len())
    by_length = longer.map({1: "chosen is longer", 0: "as long", -1: "chosen is shorter"})
    for name, groups in {"subset": table["subset"], "length": by_length}.items():
        rows = [
            {name: key, **proportion(part).columns("accuracy"), "pairs": len(part)}
            for key, part in right.groupby(groups)
        ]
        found[f"Accuracy by {name}"] = pd.DataFrame(rows)
    categories = accuracy_by_category(table, right)
    return found | {"Accuracy by category, subsets of RewardBench at its weights": categories}
