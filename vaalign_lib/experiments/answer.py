"""Policies of several methods, trained in whatever way, as an answer: which gain more, vary less, and end no
better than they started less often; and what so many of them could have shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, TypeAdapter

from vaalign_lib.figures.compare import comparison
from vaalign_lib.papers.printed import Criterion, Finding, is_met
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.power import smallest_gap_seen, smallest_risk_seen, smallest_variance_ratio_seen
from vaalign_lib.statistics.returns import Ratio, Returns, decomposition, risk, training_variance_ratio
from vaalign_lib.statistics.tests import (
    Estimate,
    difference,
    mean,
    paired_brown_forsythe,
    proportion_difference,
)
from vaalign_lib.store import DATA, write_atomically
from vaalign_lib.training.matched_kl import LAST

RULES = DATA / "compare_rules.yaml"
RESAMPLES = 10_000


class Sentence(BaseModel):
    """A rule by which a finding is put into words; see data/compare_rules.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    measure: str
    criterion: Criterion
    met: str
    not_met: str
    unclear: str
    blind: str = ""  # in place of `unclear` where no effect could have been seen

    def said(self, row: Mapping[str, Any]) -> str:
        """Say what a row of the contrasts shows, by the rule."""
        value, low, high = (row[f"{self.measure}{end}"] for end in ("", "_low", "_high"))
        if not np.isfinite([value, low, high]).all():
            return ""
        met = is_met(self.criterion, Finding(rule=self.id, reproduced="", value=value, low=low, high=high))
        lost, seen = {"lost": -value, "low_lost": -low, "high_lost": -high}, row.get(f"{self.measure}_seen")
        unclear = self.blind if seen is not None and not np.isfinite(seen) else self.unclear
        text = unclear if met is None else self.met if met else self.not_met
        return text.format(**row, **lost, value=value, low=low, high=high, seen=seen)


@cache
def sentences() -> list[Sentence]:
    """Return the rules of the paragraph of findings."""
    return TypeAdapter(list[Sentence]).validate_python(yaml.safe_load(RULES.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Answer:
    """Policies of several methods, from one start and one source of rewards in every world.

    `policies` has a row for each, with `world`, `method`, `policy`, the `outcome` that they are compared by,
    its standard error `outcome_error`, and `kl`; policies of one number share their random numbers.
    `reference` has `world` and the `outcome` of evaluations of the policy that all start from.
    """

    policies: pd.DataFrame
    reference: pd.DataFrame
    unit: str = "policies"  # in words

    @cached_property
    def methods(self) -> list[str]:
        """The methods; the first is the one that others are compared with."""
        return list(dict.fromkeys(self.policies["method"]))

    @cached_property
    def worlds(self) -> list[Any]:
        return list(dict.fromkeys(self.policies["world"]))

    def _part(self, world: Any, method: str) -> pd.DataFrame:
        mine = (self.policies["world"] == world) & (self.policies["method"] == method)
        return self.policies[mine].sort_values("policy")

    def _returns(self, world: Any, method: str) -> Returns:
        table = self._part(world, method)
        return Returns(table["outcome"].to_numpy(), table["outcome_error"].to_numpy())

    def _bar(self, world: Any) -> Array:
        return self.reference.loc[self.reference["world"] == world, "outcome"].to_numpy()

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each world and method: `gain` over the start, `variance` over policies that training
        makes, `risk` to end no better than the start, `kl` in nats; each with its 95% interval.
        """
        rows = []
        for world in self.worlds:
            for method in self.methods:
                returns, bar = self._returns(world, method), self._bar(world)
                found = {
                    "gain": difference(mean(returns.values), mean(bar)),
                    "variance": decomposition(returns)["training"],
                    "risk": risk(returns.values, bar),
                    "kl": mean(self._part(world, method)["kl"]),
                }
                row = {"world": world, "method": method, self.unit: returns.values.size}
                rows.append(row | {k: v for name, one in found.items() for k, v in one.columns(name).items()})
        return pd.DataFrame(rows)

    @cached_property
    def contrasts(self) -> pd.DataFrame:
        """A row for each world and method beside the first, and over several worlds one of their mean.

        `gain_difference` is by pairs of policies, `variance_ratio` that of the training variances, the
        first's over this one's, resampled by pairs, `risk_difference` the first's risk minus this one's,
        `kl_off` how far the KLs are apart; `..._seen` is the smallest effect that would have been seen with a
        power of 80%, of variances and risks if policies were not paired; `p_paired` is Brown and Forsythe's.
        """
        rows = [self._contrast(world, method) for method in self.methods[1:] for world in self.worlds]
        table = pd.DataFrame(rows)
        if len(self.worlds) > 1:
            means = [_over_worlds(part) for _, part in table.groupby("method", sort=False)]
            table = pd.concat([table, pd.DataFrame(means)], ignore_index=True)
        return table

    def _contrast(self, world: Any, method: str) -> dict[str, Any]:
        base, other = (self._returns(world, one) for one in (self.methods[0], method))
        kls = [self._part(world, one)["kl"].mean() for one in (self.methods[0], method)]
        size, bar = base.values.size, self._bar(world).mean()
        drawn = np.random.default_rng(0).integers(size, size=(RESAMPLES, size))
        nothing = Estimate(np.nan, np.nan, np.nan, size)  # where all policies of a method are worth the same
        varied = min(base.total, other.total) > 0
        ratio = training_variance_ratio([base], [other], [drawn]) if varied else nothing
        below = [int((one.values <= bar).sum()) for one in (base, other)]
        apart = other.values - base.values
        off = abs(kls[1] / kls[0] - 1) if kls[0] else np.nan
        safer = min(below) / size
        found = {
            "gain_difference": mean(apart),
            "variance_ratio": ratio,
            "risk_difference": proportion_difference(below[0], size, below[1], size),
            "kl_off": Estimate(off, off, off, size),
        }
        return {"world": str(world), "method": method, "baseline": self.methods[0]} | {
            **{k: v for name, one in found.items() for k, v in one.columns(name).items()},
            "gain_difference_seen": smallest_gap_seen(float(apart.std(ddof=1)), size),
            "variance_ratio_seen": smallest_variance_ratio_seen(size),
            "risk_difference_seen": smallest_risk_seen(safer, size) - safer,
            "measurable": isinstance(ratio, Ratio) and ratio.measurable,
            "p_paired": paired_brown_forsythe(base.values, other.values) if np.ptp(apart) else 1.0,
        }

    @cached_property
    def said(self) -> dict[str, dict[str, str]]:
        """What the rules say of each method beside the first, by their ids; of several worlds the mean."""
        rows = self.contrasts.groupby("method", sort=False).tail(1).to_dict("records")
        noise = "A variance does not stand out from the noise of its evaluation: evaluate on more."
        return {
            row["method"]: {one.id: one.said(row) for one in sentences()}
            | ({} if row["measurable"] else {"variance": noise})
            for row in rows
        }

    @cached_property
    def text(self) -> str:
        """One paragraph: what was compared, and for each method what the rules say of it."""
        sizes = self.policies.groupby(["world", "method"]).size()
        worlds = f" in each of {len(self.worlds)} worlds" if len(self.worlds) > 1 else ""
        parts = [f"{sizes.min()} {self.unit} of each method{worlds}."]
        parts += [one for told in self.said.values() for one in told.values() if one]
        return " ".join(parts)

    def figure(self) -> Figure:
        """Draw gains over KL, and the contrasts with what would have been seen."""
        first, *more = self.said.values()
        title = self.text.partition(". ")[0] + "." if more else f"{first['gain']} {first['variance']}"
        start = self.reference.groupby("world")["outcome"].mean()
        gains = self.policies.assign(gain=self.policies["outcome"] - self.policies["world"].map(start))
        return comparison(gains, self.contrasts, title, self.unit)

    def write(self, folder: Path) -> list[Path]:
        """Write tables (Parquet), `answer.md`, `answer.json` and the figure into a folder."""
        tables = {"policies": self.policies, "reference": self.reference}
        tables |= {"table": self.table, "contrasts": self.contrasts}
        folder.mkdir(parents=True, exist_ok=True)
        for name, one in tables.items():
            one.to_parquet(folder / f"{name}.parquet", index=False)
        shown = [brief(self.table), brief(self.contrasts)]
        parts = ["# Comparison", self.text, *(one.to_markdown(index=False) for one in shown)]
        write_atomically(folder / "answer.md", "\n\n".join([*parts, "![](answer.png)"]) + "\n")
        records = {
            name: json.loads(tables[name].to_json(orient="records")) for name in ("table", "contrasts")
        }
        write_atomically(folder / "answer.json", json.dumps({"text": self.text} | records, indent=1) + "\n")
        figure = self.figure()
        for ending in ("png", "pdf"):
            figure.savefig(folder / f"answer.{ending}", dpi=200)
        return [folder / name for name in ("answer.md", "answer.json", "answer.png")]


def _over_worlds(part: pd.DataFrame) -> dict[str, Any]:
    """Return the mean over worlds of one method's contrasts, with Student's interval over worlds."""
    row = {"world": "all", **part.iloc[0][["method", "baseline"]]}
    row |= mean(part["gain_difference"]).columns("gain_difference") | mean(part["risk_difference"]).columns(
        "risk_difference"
    )
    ratio = mean(np.log(part["variance_ratio"])).columns("variance_ratio")
    off = part["kl_off"].max()
    seen = smallest_gap_seen(float(part["gain_difference"].std(ddof=1)), len(part))
    logs = smallest_gap_seen(float(np.log(part["variance_ratio"]).std(ddof=1)), len(part))
    risks = smallest_gap_seen(float(part["risk_difference"].std(ddof=1)), len(part))
    return (
        row
        | {name: float(np.exp(value)) for name, value in ratio.items()}
        | Estimate(off, off, off, len(part)).columns("kl_off")
        | {
            "gain_difference_seen": seen,
            "variance_ratio_seen": float(np.exp(logs)),
            "risk_difference_seen": risks,
        }
        | {"measurable": bool(part["measurable"].all())}
    )


def brief(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its intervals in one column each, as text to read."""
    found: dict[str, Any] = {}
    for name in (one for one in table if not one.endswith(("_low", "_high"))):
        if f"{name}_low" not in table:
            numeric = table[name].dtype == float
            found[name] = [f"{one:.3g}" if numeric else str(one) for one in table[name]]
        elif name == "kl_off":
            found[name] = [f"{one:.1%}" for one in table[name]]
        else:
            ends = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
            found[name] = [f"{value:.3g} [{low:.3g}, {high:.3g}]" for value, low, high in ends]
    return pd.DataFrame(found).rename(columns=lambda name: name.replace("_", " "))


def of_trainers(trainers: Mapping[str, Sequence[Any]]) -> Answer:
    """Return the answer of trainers of TRL after training, by method, each with a seed of its own.

    Trainers of one place share their seed. A seed's outcome is its mean reward over the last ten logged
    steps, with the standard error of that mean; the start's is the reward of the first step.
    """
    from vaalign_lib.training.trl_runs import training_log  # here, for it takes seconds

    rows, starts = [], []
    for method, seeds in trainers.items():
        for seed, trainer in enumerate(seeds):
            log = training_log(trainer)
            last = log.tail(LAST)
            found = {
                "outcome": last["reward"].mean(),
                "outcome_error": last["reward"].sem(),
                "kl": last["kl"].mean(),
            }
            rows.append({"world": 0, "method": method, "policy": seed, **found})
            starts.append({"world": 0, "outcome": log["reward"].iloc[0]})
    return Answer(pd.DataFrame(rows), pd.DataFrame(starts), "seeds")
