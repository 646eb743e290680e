"""Results of the runs of notebook 04: a row per policy, collected, published, and read again.

What is published lies in data/results/runs/<profile>/ as five tables: `policies` has a row per policy,
`runs` one per stack (what it was, its keys, what it cost), `curves` one per stack and step, `looks` one per
policy and step at which it was evaluated, `rewards` what the reward models cost.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from vaalign_lib.data.pairs import EMBEDDED, DataError
from vaalign_lib.experiments.comparisons import OF_A_RUN
from vaalign_lib.experiments.conditions import ENSEMBLE_ROW, REFERENCE, Condition, Regime, plan
from vaalign_lib.experiments.policies import ensemble_folder, settings_key, train_run, train_runs
from vaalign_lib.experiments.references import reference
from vaalign_lib.experiments.reward_models import prepare
from vaalign_lib.profiles import PUBLISHED_PROFILE, Profile, RunGroup, Study, load_profile
from vaalign_lib.statistics.tests import rounded
from vaalign_lib.store import (
    RESULTS,
    NotKeptError,
    RunStore,
    new_folder,
    read_once,
    read_record,
    write_record,
)

PUBLISHED = RESULTS / "runs"
COMPARED_GROUPS: tuple[RunGroup, ...] = ("primary", "main_rows", "matched_kl", "independent")
PRINTED_GROUPS: tuple[RunGroup, ...] = ("printed_rows", "printed_ranges")  # outside of the embedded world
HERE = "this run"  # the origin of what was trained, not published
DIGITS = 7  # significant ones of what is published; standard errors are in the second
WINDOW = 5  # steps that curves are averaged over
MEASURES = ("reward", "true_reward", "gold", "log_ratio", "length", "variance", "penalty", "coefficient")
_COSTS = ["table", "what", "seconds", "bytes"]
_READ = {  # what results have at least
    "policies": ["run", "policy", "true_reward"],
    "runs": ["run", *OF_A_RUN],
    "curves": ["run", "step"],
}


@dataclass(frozen=True)
class Results:
    """What is known of a number of runs.

    Attributes:
        policies: a row per policy: `run`, what the run was, and what `evaluation` measured.
        runs: a row per run: `run`, `origin`, what it was, `key`, `settings`, and what it cost.
        curves: a row per run and step; see `curves_of`.
        rewards: what reward models cost: `table` of the paper, `what`, `seconds`, `bytes`.
        looks: a row per run, policy and step on its way, and at its end; as `policies`.
    """

    policies: pd.DataFrame
    runs: pd.DataFrame
    curves: pd.DataFrame
    rewards: pd.DataFrame
    looks: pd.DataFrame

    @property
    def names(self) -> set[str]:
        """The names of the runs."""
        return set(self.runs["run"])

    @property
    def trained_here(self) -> "Results":
        """What is known of the runs that were not published before."""
        return self.of(self.runs.loc[self.runs["origin"] == HERE, "run"])

    @property
    def conditions(self) -> list[Condition]:
        """The runs."""
        return [Condition(**row) for row in self.runs[OF_A_RUN].to_dict("records")]

    def kl(self) -> dict[Condition, float]:
        """Return the mean KL of every run's policies."""
        means = self.policies.groupby("run")["kl"].mean()
        return {run: float(means[run.name]) for run in self.conditions}

    def of(self, names: Iterable[str]) -> "Results":
        """Return what is known of some runs."""
        wanted = set(names)
        tables = (self.policies, self.runs, self.curves, self.looks)
        policies, runs, curves, looks = (one[one["run"].isin(wanted)] for one in tables)
        return Results(policies, runs, curves, self.rewards, looks)

    def without(self, names: Iterable[str]) -> "Results":
        """Return what is known of all other runs."""
        return self.of(self.names - set(names))

    def joined(self, further: "Results") -> "Results":
        """Add runs that are not among these."""
        others = further.without(self.names)
        return Results(
            _joined([self.policies, others.policies]),
            _joined([self.runs, others.runs]),
            _joined([self.curves, others.curves]),
            further.rewards if self.rewards.empty else self.rewards,
            _joined([self.looks, others.looks]),
        )

    def write(self, folder: Path) -> None:
        """Write the five tables into a folder, all or none."""
        tables = {
            "policies": self.policies.drop(columns=OF_A_RUN),
            "runs": self.runs.drop(columns="origin"),
            "curves": self.curves,
            "rewards": self.rewards,
            "looks": self.looks,
        }
        with new_folder(folder) as partial:
            for name, table in tables.items():
                table.to_parquet(partial / f"{name}.parquet", index=False, compression="zstd")
            write_record(partial, {})


def read(folder: Path, origin: str) -> Results:
    """Read what `Results.write` has written; `origin` says where it came from.

    Raises:
        DataError: there are no policies, runs or curves, or they do not go together; what reward models
            cost may be missing.
    """
    if lacks := [f"{one}.parquet" for one in _READ if not (folder / f"{one}.parquet").is_file()]:
        raise DataError(f"results: {folder} has no {', '.join(lacks)}")
    tables = {name: _table(folder / f"{name}.parquet", columns) for name, columns in _READ.items()}
    policies, runs, curves = tables.values()
    if runs["run"].duplicated().any():
        raise DataError(f"{folder / 'runs.parquet'}: a run stands there twice; expected a row each")
    if unknown := sorted({*policies["run"], *curves["run"]} - {*runs["run"]}, key=str):
        raise DataError(f"{folder / 'runs.parquet'}: no row for {unknown[0]!r}, which has policies")
    costs = folder / "rewards.parquet"
    rewards = _table(costs, _COSTS) if costs.is_file() else pd.DataFrame(columns=_COSTS)
    described = policies.merge(runs[["run", *OF_A_RUN]], on="run", validate="many_to_one")
    looks = folder / "looks.parquet"
    seen = _table(looks, ["run", "policy", "step"]) if looks.is_file() else _empty().looks
    return Results(described, runs.assign(origin=origin), curves, rewards, seen)


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: no whole Parquet file: {error}") from None
    if lacks := [name for name in columns if name not in table]:
        raise DataError(f"{path}: no column {', '.join(lacks)}; it has {', '.join(map(str, table))}")
    return table


@read_once()
def trained(study: Study, folders: Mapping[Condition, Path]) -> Results:
    """Collect runs from their folders, rounded as they are published, so that figures drawn from either
    are the same.
    """
    nothing = _empty()
    policies, runs, curves, looks = [nothing.policies], [], [nothing.curves], [nothing.looks]
    for run, folder in folders.items():
        described = {"run": run.name, **asdict(run)}
        policies.append(pd.read_parquet(folder / "policies.parquet").assign(**described))
        made = {
            "origin": HERE,
            "device": hardware(),
            "key": folder.name.rpartition("-")[2],
            "settings": settings_key(study.profile, study.seed, run),
        }
        runs.append(described | made | _costs(folder))
        if run.objective != REFERENCE:
            log = pd.read_parquet(folder / "log.parquet")
            curves.append(curves_of(log).assign(run=run.name))
        if (folder / "looks.parquet").is_file():
            last = policies[-1].drop(columns=OF_A_RUN).assign(step=log["step"].max())
            looks += [pd.read_parquet(folder / "looks.parquet").assign(run=run.name), last]
    tables = (
        _joined(policies),
        _joined([nothing.runs, pd.DataFrame(runs)]),
        _joined(curves),
        reward_costs(study),
        _joined(looks),
    )
    return Results(*(table.map(partial(rounded, digits=DIGITS)) for table in tables))


def reward_costs(study: Study) -> pd.DataFrame:
    """Return what the reward model and its ensemble of heads cost, where the store has made them."""
    kept, rows = Study(RunStore(study.store.root, reads_only=True), study.profile, study.seed), []
    with suppress(NotKeptError):
        model = prepare(kept, reference=reference(kept, "gpt2")).reward_model
        heads = ensemble_folder(kept, Condition(*ENSEMBLE_ROW))
        together = f"{study.profile.ensembles.members} heads on its frozen backbone"
        for table, what, folder in (("Table 6", "one reward model", model), ("Table 8", together, heads)):
            record = kept.store.record(folder)
            rows.append((table, what, record["seconds"], record["bytes"]))
    return pd.DataFrame(rows, columns=_COSTS)


def _costs(folder: Path) -> dict[str, Any]:
    """Return what a stack cost, and, where its coefficient was looked for, what was found."""
    found: dict[str, Any] = {"beta": np.nan, "off": np.nan, "attempts": np.nan}
    if (folder / "resources.json").is_file():
        found |= json.loads((folder / "resources.json").read_text())
    if (folder / "attempts.parquet").is_file():
        attempts = pd.read_parquet(folder / "attempts.parquet")
        found |= attempts[["beta", "off"]].iloc[-1].to_dict() | {"attempts": len(attempts)}
    return found


def curves_of(log: pd.DataFrame, measures: Sequence[str] = MEASURES) -> pd.DataFrame:
    """Return a row per step: of every measure the mean over policies and the middle 80% of them
    (`_low`, `_high`), each policy averaged over five steps. What trainers log as `kl` is the `log_ratio`.
    """
    log = log.rename(columns={"kl": "log_ratio"})
    found: dict[str, Any] = {}
    for measure in (one for one in measures if one in log):
        table = log.pivot(index="step", columns="policy", values=measure)
        smooth = table.rolling(WINDOW, min_periods=1).mean()
        found[measure] = smooth.mean(axis=1)
        found[f"{measure}_low"], found[f"{measure}_high"] = np.quantile(smooth, (0.1, 0.9), axis=1)
    return pd.DataFrame(found).reset_index()


def main_regime(profile: Profile) -> Regime:
    """Return the penalty regime in which a profile compares the rows of Tables 1 to 3.

    In the embedded world the printed coefficients do not fit the rewards, elsewhere they are the paper's.
    """
    return "equal_mean_penalty" if profile.policies.data == EMBEDDED else "as_printed"


def ranges_regime(profile: Profile) -> Regime:
    """Return the penalty regime in which a profile compares ranges of reward (Figure 7, Table 4).

    In the embedded world the printed control of the KL winds up at the rate of the other rows.
    """
    return "printed_fixed" if profile.policies.data == EMBEDDED else "as_printed"


def collect(study: Study, workers: int | str, from_results: bool = False) -> Results:
    """Return the results of the profile's runs and of what else is published with its settings.

    What is neither in the store nor published is trained.

    `workers` are processes of this machine, or the address of a dask scheduler; `from_results` trains
    nothing and takes what is published.

    Raises:
        LookupError: runs that the notebooks compare are not among them.
        PlanError: the plan of real models and paid judges was not shown yet, or something is missing.
    """
    planned = plan(study.profile.policies.runs)
    known = published(study.profile, study.seed)
    if not from_results:
        # the profile whose results are committed trains its own runs; others what is not published yet
        own_profile = study.profile.name == PUBLISHED_PROFILE
        others = known.without([one.name for one in planned]) if own_profile else known
        folders = train_runs(study, planned, workers, others.kl())
        known = trained(study, folders).joined(others)
    groups = COMPARED_GROUPS if study.profile.policies.data == EMBEDDED else PRINTED_GROUPS
    if missing := [one.name for one in plan(groups) if one.name not in known.names]:
        raise LookupError(
            f"policies.runs: the notebooks need {', '.join(groups)}, trained or published with these "
            f"settings; missing: {', '.join(missing)}"
            + ("; from_results = False trains them" if from_results else "")
        )
    return known


# --- what is published --------------------------------------------------------------------------------


@read_once()
def published(profile: Profile, seed: int, folder: Path = PUBLISHED) -> Results:
    """Return the published results that belong to these settings, of whatever profile.

    They are known by their settings, not by their code: what was published by earlier code stays valid.

    Raises:
        DamagedError: a file is not what was published.
    """
    found = _empty()
    for place in sorted({path.parent for path in folder.glob("*/*.*")}):
        read_record(place)
        results = read(place, _origin(place.name))
        keys = [settings_key(profile, seed, run) for run in results.conditions]
        found = found.joined(results.of(results.runs.loc[results.runs["settings"] == keys, "run"]))
    return found


@read_once()
def publish_runs(
    study: Study, runs: Sequence[Condition], folder: Path = PUBLISHED, whole: bool = False
) -> list[str]:
    """Publish those of some runs that are finished, beside what the profile has published before.

    What other profiles have published is left out. What was published with other settings goes.

    Returns:
        The names of the runs that were added or replaced.

    Raises:
        DataError: `whole`, and only some of the runs are finished: published beside those of an earlier
            run, what is compared would be of two.
    """
    finished = Study(RunStore(study.store.root, reads_only=True), study.profile, study.seed)
    published_before = published(study.profile, study.seed, folder)
    mine = published_before.runs["origin"] == _origin(study.profile.name)
    before = published_before.of(published_before.runs.loc[mine, "run"])
    elsewhere = published_before.names - before.names
    own_runs = [one for one in runs if one.name not in elsewhere]
    folders: dict[Condition, Path] = {}
    for run in own_runs:
        with suppress(NotKeptError):
            folders[run] = train_run(finished, run)
    if not folders:
        return []
    if whole and len(folders) < len(own_runs):
        raise DataError(
            f"publish: {len(folders)} of {len(own_runs)} stacks are trained in {study.store.root}; they are "
            f"published together, so that what is compared is of one run: `vaalign reproduce` trains the rest"
        )
    place = folder / study.profile.name
    own = trained(study, folders)
    known = own.runs["run"].map(before.runs.set_index("run")["key"])
    changed = own.runs.loc[known != own.runs["key"], "run"].to_list()
    held = read(place, "").names if (place / "runs.parquet").is_file() else set()
    if changed or held - own.names - before.names:
        own.joined(before).write(place)
    return changed


def rekey(folder: Path = PUBLISHED) -> None:
    """Give published runs the keys that their profiles' settings have now.

    To be called once after a setting was added whose default says what was done before; nothing else may have
    changed, for what the runs were made with is not looked at.
    """
    for place in sorted({path.parent for path in folder.glob("*/runs.parquet")}):
        known, profile = read(place, ""), load_profile(place.name)
        keys = [settings_key(profile, 0, run) for run in known.conditions]
        replace(known, runs=known.runs.assign(settings=keys)).write(place)


def _origin(profile: str) -> str:
    return f"published, {profile}"


def hardware() -> str:
    """Return the device that stacks are trained on here, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU core a stack"


def _empty() -> Results:
    runs = ["run", "origin", "device", "key", "settings", *OF_A_RUN]
    columns = (["run", "policy", "kl", *OF_A_RUN], runs, ["run", "step"], _COSTS, ["run", "policy", "step"])
    return Results(*(pd.DataFrame(columns=names) for names in columns))


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Append tables; empty ones have no say in the types of columns."""
    filled = [table for table in tables if not table.empty]
    return pd.concat(filled, ignore_index=True) if filled else tables[0]
