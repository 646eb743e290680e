"""Notebook 10: all its tables, computed or committed, and the policies that were trained."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from vaalign_lib.data.pairs import DataError
from vaalign_lib.experiments import attributes, people, people_bench, people_frontier
from vaalign_lib.experiments.conditions import HEADS_ROW, PEOPLE_ROW, REFERENCE, Condition, group, plan
from vaalign_lib.experiments.people_bench import SHOWN_PROMPTS
from vaalign_lib.experiments.policies import train_runs
from vaalign_lib.experiments.results import trained
from vaalign_lib.profiles import Study
from vaalign_lib.store import RESULTS, NotKeptError, RunStore
from vaalign_lib.training.run import ANSWERS

COMMITTED = RESULTS / "people"
ROWS = {PEOPLE_ROW: "people", HEADS_ROW: "people_heads"}  # and the group that trains each


def results(study: Study, workers: int | str = 1, train: bool = False) -> dict[str, pd.DataFrame]:
    """Return all tables of the notebook: measured here, now or before, where the profile names rated texts,
    else as they are committed; with `train` also those of policies that are trained.
    """
    if study.profile.raters is None:
        return committed()
    stored = people_bench.Stored(study)
    found = people.measured(study) | people_bench.measured(stored)
    found |= {"frontier": people_frontier.rows(stored.judged)} | attributes.measured_people(study)
    if not train:
        return found
    folders = train_runs(study, plan(study.profile.policies.runs), workers)
    return found | of_trained(study, folders)


def of_trained(study: Study, folders: Mapping[Condition, Path]) -> dict[str, pd.DataFrame]:
    """Return `policies`, `runs` and `curves` of trained stacks, and in `answers` what the first policy of
    each wrote to the first prompts.
    """
    known, first = trained(study, folders), []
    for run, folder in folders.items():
        answers = pd.read_parquet(folder / ANSWERS).drop_duplicates(["policy", "prompt"])
        shown = (answers["policy"] == answers["policy"].min()) & (answers["prompt"] < SHOWN_PROMPTS)
        first.append(answers[shown].assign(run=run.name))
    tables = {"policies": known.policies, "runs": known.runs, "curves": known.curves}
    return tables | {"answers": pd.concat(first, ignore_index=True)}


def committed(folder: Path = COMMITTED) -> dict[str, pd.DataFrame]:
    """Return the tables that are committed.

    Raises:
        DataError: there are none.
    """
    if not (found := {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}):
        raise DataError(f"{folder}: holds no tables; `vaalign publish --profile pretrained` writes them")
    return found


def publish(study: Study, folder: Path = COMMITTED) -> list[str]:
    """Write the tables of a finished run where they are committed; return their names."""
    finished = Study(RunStore(study.store.root, reads_only=True), study.profile, study.seed)
    folder.mkdir(parents=True, exist_ok=True)
    tables = results(finished)
    with suppress(NotKeptError):  # where policies were trained
        tables |= of_trained(finished, train_runs(finished, plan(study.profile.policies.runs), 1))
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")
    return list(tables)


# --- policies that were trained -------------------------------------------------------------------------


def stacks(row: tuple[str, str]) -> dict[str, Condition]:
    """Return the stacks of a row by method, the reference's evaluations among them."""
    found = {one.objective: one for one in group(ROWS[row])}  # type: ignore[arg-type]
    plain = found["variance_aware"].vanilla
    return {REFERENCE: plain.start, "vanilla": plain} | found


def by_method(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a row for each trained stack: policies, steps, means of what was evaluated, and the deviation of
    the true reward over policies beside the noise of its evaluation.
    """
    rows = []
    steps = tables["curves"].groupby("run")["step"].max()
    for name, one in tables["policies"].groupby("run", sort=False):
        measured = {key: one[key].mean() for key in ("true_reward", "kl", "variance", "length")}
        noise = float(np.sqrt((one["true_reward_error"] ** 2).mean()))
        about = {"run": name, "policies": len(one), "steps": steps.get(name, 0)} | measured
        rows.append(about | {"deviation": one["true_reward"].std(ddof=1), "noise": noise})
    return pd.DataFrame(rows)
