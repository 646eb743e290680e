"""Notebook 10: all its tables, computed or committed, and the policies that were trained."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from vaalign_lib.data.pairs import DataError
from vaalign_lib.experiments import attributes, people, people_bench, people_frontier
from vaalign_lib.experiments.answer import Answer
from vaalign_lib.experiments.comparisons import Comparisons, policies_of
from vaalign_lib.experiments.conditions import (
    HEADS_ROW,
    PEOPLE_ROW,
    PLACEBO,
    REFERENCE,
    Condition,
    group,
    plan,
)
from vaalign_lib.experiments.endpoint import in_world
from vaalign_lib.experiments.people_bench import SHOWN_PROMPTS
from vaalign_lib.experiments.policies import train_run, train_runs
from vaalign_lib.experiments.results import trained
from vaalign_lib.profiles import ProfileError, Study
from vaalign_lib.statistics.returns import training_variance_ratio
from vaalign_lib.store import RESULTS, NotKeptError, RunStore
from vaalign_lib.training.run import ANSWERS

COMMITTED = RESULTS / "people"
ASKED, TOLERANCE = 24, 0.1  # policies of a method, and of vanilla's KL, by data/protocols/10.md
ROWS = {PEOPLE_ROW: "people", HEADS_ROW: "people_heads"}  # and the group that trains each


def results(study: Study, workers: int | str = 1, train: bool = False) -> dict[str, pd.DataFrame]:
    """Return all tables of the notebook: measured here, now or before, where the profile names rated texts,
    else as they are committed; with `train` also those of policies that are trained.

    Raises:
        ProfileError: policies are to be trained, and one of a method, which has no variance.
    """
    if study.profile.raters is None:
        return committed()
    if train and study.profile.policies.count < 2:
        raise ProfileError("policies.count: expected two or more of each method for a variance, got 1")
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
    """Write the tables of a finished run where they are committed, those of stacks that were trained among
    them; return their names.
    """
    finished = Study(RunStore(study.store.root, reads_only=True), study.profile, study.seed)
    folder.mkdir(parents=True, exist_ok=True)
    tables, folders = results(finished), {}
    for run in plan(study.profile.policies.runs):
        with suppress(NotKeptError):
            folders[run] = train_run(finished, run)
    if any(run.objective != REFERENCE for run in folders):
        tables |= of_trained(finished, folders)
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")
    return list(tables)


# --- policies that were trained -------------------------------------------------------------------------


def stacks(row: tuple[str, str]) -> dict[str, Condition]:
    """Return the stacks of a row by method, the reference's evaluations among them."""
    found = {one.objective: one for one in group(ROWS[row])}  # type: ignore[arg-type]
    plain = found["variance_aware"].vanilla
    return {REFERENCE: plain.start, "vanilla": plain} | found


def known(policies: pd.DataFrame) -> dict[str, dict[str, Condition]]:
    """Return by row and method the stacks of which policies are known; a row needs its reference."""
    names = set(policies["run"])
    found = {row[1]: {name: one for name, one in stacks(row).items() if one.name in names} for row in ROWS}
    return {row: runs for row, runs in found.items() if REFERENCE in runs and len(runs) > 1}


def gains(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return all policies, and evaluations of the reference, with `row`, `method` and `gain`, the true reward
    over the reference's mean.
    """
    parts = []
    for row, runs in known(tables["policies"]).items():
        bar = policies_of(tables["policies"], runs[REFERENCE])["true_reward"].mean()
        for method, run in runs.items():
            one = policies_of(tables["policies"], run)
            parts.append(one.assign(row=row, method=method, gain=one["true_reward"] - bar))
    return pd.concat(parts, ignore_index=True)


def by_method(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a row for each trained stack: `policies`, `steps`, and with 95% intervals `gain` in true reward
    over the reference, `kl`, `variance` over policies without the `noise` of its evaluation, and `risk` to
    end no better than the reference; `kl_off`, how far the KL is from vanilla's, `equal_kl`, whether the
    protocol allows that; `disputed`, the mean variance of what is written, and its `length`.
    """
    steps, parts = tables["curves"].groupby("run")["step"].max(), []
    for row, one in gains(tables).groupby("row", sort=False):
        named = {"true_reward": "outcome", "true_reward_error": "outcome_error"}
        told, start = one.rename(columns=named), one["method"] == REFERENCE
        found = Answer(told[~start], told[start]).table.drop(columns="world").set_index("method")
        written = one[~start].rename(columns={"variance": "disputed"}).groupby("method")
        found.insert(1, "steps", written["run"].first().map(steps))
        found["noise"] = written["true_reward_error"].agg(lambda errors: (errors**2).mean())
        found["kl_off"] = found["kl"] / found["kl"].get("vanilla", float("nan")) - 1
        found["equal_kl"] = found["kl_off"].abs().le(TOLERANCE).map({True: "yes", False: "no"})
        found = found.join(written[["disputed", "length"]].mean()).reset_index()
        parts.append(found.assign(row=row))
    table = pd.concat(parts, ignore_index=True)
    return table[["row", *table.columns.drop("row")]]


def contrasts(tables: Mapping[str, pd.DataFrame], resamples: int = 10_000) -> pd.DataFrame:
    """Return by row and rival what the protocol asks of variance-aware policies, in true reward: `log_ratio`,
    which is L, `ratio`, the rival's variance over variance-aware's, and `difference` of gains, with 95%
    intervals over policies, which are drawn again together.

    Variances are without the noise of the evaluation, a hundredth of the total at least. `floored` is the
    share of resamples in which one did not stand out from it, `said` what the row says of L.
    """
    off = by_method(tables).set_index(["row", "method"])["kl_off"]
    comparisons = Comparisons(tables["policies"], resamples=resamples, outcome="true_reward")
    rows = []
    for row, runs in known(tables["policies"]).items():
        for rival in (one for one in (PLACEBO, "vanilla") if {one, "variance_aware"} <= set(runs)):
            found = _contrast(comparisons, [runs[rival], runs["variance_aware"]], off[row].to_dict())
            rows.append({"row": row, "rival": rival} | found)
    return pd.DataFrame(rows)


def _contrast(comparisons: Comparisons, pair: list[Condition], off: Mapping[str, float]) -> dict[str, Any]:
    """Compare a rival and variance-aware policies, a pair; `off`: by method, of KLs from vanilla's."""
    returns, rows = [comparisons.returns(one) for one in pair], comparisons.rows(pair[1])
    ratio, found = training_variance_ratio(returns[:1], returns[1:], [rows]), in_world(comparisons, *pair)
    count, noisy = rows.shape[1], []
    doubts = [f"{count} policies of {ASKED}"] * (count < ASKED)
    for name, run, one in zip(("rival", "aware"), pair, returns, strict=True):
        word, apart = run.objective.replace("_", "-"), off[run.objective]
        sure = found[f"gain_{name}"] > 2 * found[f"gain_{name}_error"]
        noisy += [word] * (one.training <= one.total / 100)
        doubts += [f"gain of {word} not above 0 by two standard errors"] * (not sure)
        doubts += [f"KL of {word} off by {apart:+.0%}"] * (abs(apart) > TOLERANCE)
    doubts += ["the interval contains 0"] * (found["log_ratio_low"] <= 0 <= found["log_ratio_high"])
    said = f"L {'above' if found['log_ratio'] > 0 else 'below'} 0"
    if noisy or not ratio.measurable:
        told = " and ".join(noisy) or f"one of both in {ratio.floored:.0%} of resamples"
        said = f"not determinable: not above the noise of the evaluation: variance of {told}"
    elif doubts:
        said = f"unclear: {'; '.join(doubts)}"
    about = {"policies": count, "floored": ratio.floored, "said": said}
    return about | found | ratio.columns("ratio")


def side_by_side(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return by row and prompt what the reference and the first policy of each method wrote."""
    parts = []
    for row, runs in known(tables["policies"]).items():
        methods = {one.name: name for name, one in runs.items()}
        mine = tables["answers"][tables["answers"]["run"].isin(methods)]
        wide = mine.assign(method=mine["run"].map(methods)).pivot(
            index="prompt", columns="method", values="answer"
        )
        parts.append(wide[list(runs)].reset_index().assign(row=row))
    return pd.concat(parts, ignore_index=True)
