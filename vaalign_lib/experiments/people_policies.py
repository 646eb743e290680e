"""Notebook 10: policies that hear one person each, compared, and what they write."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from vaalign_lib.data.pairs import DataError, read_prompts
from vaalign_lib.experiments import endpoint
from vaalign_lib.experiments.comparisons import Comparisons
from vaalign_lib.experiments.conditions import (
    HEADS_ROW,
    PEOPLE_ROW,
    PLACEBO,
    REFERENCE,
    Condition,
    group,
    plan,
)
from vaalign_lib.experiments.people import heard_words, measured
from vaalign_lib.experiments.policies import train_runs
from vaalign_lib.experiments.results import trained
from vaalign_lib.profiles import Study
from vaalign_lib.rewards.base import Array
from vaalign_lib.rewards.raters import HeardWords
from vaalign_lib.statistics.tests import Estimate
from vaalign_lib.store import RESULTS, RunStore
from vaalign_lib.training.run import ANSWERS

COMMITTED = RESULTS / "people"
ROWS = {PEOPLE_ROW: "people", HEADS_ROW: "people_heads"}  # and the group that trains each
RIVALS = (PLACEBO, "vanilla")
SHOWN_WORDS, SHOWN_PROMPTS = 8, 4  # words of each method that fall and that rise most; prompts of examples
ORDER = (REFERENCE, "vanilla", "variance_aware", PLACEBO)


def results(study: Study, workers: int | str = 1) -> dict[str, pd.DataFrame]:
    """Return all tables of the notebook: measured and trained here, now or before, where the profile names
    rated texts, else as they are committed.
    """
    if study.profile.raters is None:
        return committed()
    folders = train_runs(study, plan(study.profile.policies.runs), workers)
    known = trained(study, folders)
    found = measured(study) | {"policies": known.policies, "runs": known.runs, "curves": known.curves}
    written = {run: pd.read_parquet(folder / ANSWERS) for run, folder in folders.items()}
    domains = read_prompts(study.profile.policies.data)["subset"].tolist()
    return found | writing(written, heard_words(study, study.seed), domains)


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
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")
    return list(tables)


# --- the endpoint ---------------------------------------------------------------------------------------


def stacks(row: tuple[str, str]) -> dict[str, Condition]:
    """Return the stacks of a row by method, the reference's evaluations among them."""
    found = {one.objective: one for one in group(ROWS[row])}  # type: ignore[arg-type]
    plain = found["variance_aware"].vanilla
    return {REFERENCE: plain.start, "vanilla": plain} | found


def known_rows(policies: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the rows all of whose stacks are known."""
    names = set(policies["run"])
    return [row for row in ROWS if {one.name for one in stacks(row).values()} <= names]


def compared(comparisons: Comparisons) -> pd.DataFrame:
    """Return a row for each row and rival of the variance-aware method, see `endpoint.by_world`;
    `log_ratio_clear` says whether both gains are above 0 by two standard errors.
    """
    found = []
    for row in known_rows(comparisons.policies):
        runs = stacks(row)
        for rival in RIVALS:
            one = endpoint.compared(comparisons, 0, runs[rival], runs["variance_aware"])
            clear = all(one[f"gain_{name}"] > 2 * one[f"gain_{name}_error"] for name in ("rival", "aware"))
            count = int((comparisons.policies["run"] == runs[rival].name).sum())
            about = {"row": row[1], "rival": rival, "policies": count}
            found.append(about | one | {"log_ratio_clear": clear})
    return pd.DataFrame(found).drop(columns="world")


def estimate_of(found: pd.Series, name: str) -> Estimate:
    """Return an estimate of `compared`; a ratio to gains that are not clear decides nothing."""
    clear = bool(found["log_ratio_clear"]) or name != "log_ratio"
    low, high, count = found[f"{name}_low"], found[f"{name}_high"], int(found["policies"])
    return endpoint.OverWorlds(found[name], low, high, count, measurable=clear)


def by_method(policies: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each row and method: policies, means and deviations of what was evaluated."""
    rows = []
    for row in known_rows(policies):
        for method, run in stacks(row).items():
            one = policies[policies["run"] == run.name]
            rows.append(
                {"row": row[1], "method": method, "policies": len(one)}
                | {name: one[name].mean() for name in ("true_reward", "kl", "variance", "length")}
                | {
                    "deviation": one["true_reward"].std(ddof=1),
                    "noise": (one["true_reward_error"] ** 2).mean() ** 0.5,
                }
            )
    return pd.DataFrame(rows)


# --- what policies write --------------------------------------------------------------------------------


def writing(
    written: Mapping[Condition, pd.DataFrame], source: HeardWords, domains: list[str]
) -> dict[str, pd.DataFrame]:
    """Return `uses`, `words` and `examples` of what policies have answered, by row and method.

    `uses` has a row for each policy: known words of a response, their mean rating and mean variance, how many
    different ones among a hundred, and the share of the most frequent one. `words`: those whose share of all
    known words falls and rises most against the reference (`change`), with their own mean and variance.
    `examples`: the first policy's answers to the first prompts, and, as `gamed`, that of all with the highest
    mean rating of three known words or more.
    """
    uses, words, examples = [], [], []
    names = {run.name: (row[1], method) for row in ROWS for method, run in stacks(row).items()}
    for row in dict.fromkeys(names[run.name][0] for run in written):
        mine = {names[run.name][1]: one for run, one in written.items() if names[run.name][0] == row}
        shares: dict[str, Array] = {}
        for method in (one for one in ORDER if one in mine):
            counts = {j: source.uses(part["answer"].tolist()) for j, part in mine[method].groupby("policy")}
            responses = len(mine[method]) / len(counts)
            uses += [
                {"row": row, "method": method, "policy": j} | _use(source, one, responses)
                for j, one in counts.items()
            ]
            total = np.sum(list(counts.values()), axis=0)
            shares[method] = total / total.sum()
            examples.append(_examples(mine[method], source, domains).assign(row=row, method=method))
        words += [
            _changes(source, share - shares[REFERENCE]).assign(row=row, method=method)
            for method, share in shares.items()
            if method != REFERENCE
        ]
    return {"uses": pd.DataFrame(uses), "words": pd.concat(words), "examples": pd.concat(examples)}


def _use(source: HeardWords, counts: np.ndarray, responses: float) -> dict[str, float]:
    total, (means, variances) = max(counts.sum(), 1), source.moments
    repeats = np.clip(counts, 0, None) / total
    return {
        "known": total / responses,
        "rating": float(repeats @ means),
        "variance": float(repeats @ variances),
        "different": float((1 - (1 - repeats) ** 100).sum()),
        "most_frequent": float(repeats.max()),
    }


def _changes(source: HeardWords, change: Array) -> pd.DataFrame:
    order = np.argsort(change, kind="stable")
    chosen = np.concatenate([order[:SHOWN_WORDS], order[-SHOWN_WORDS:]])
    means, variances = (one[chosen] for one in source.moments)
    named = source.words["text"].iloc[chosen].tolist()
    return pd.DataFrame({"word": named, "change": change[chosen], "mean": means, "variance": variances})


def _examples(answers: pd.DataFrame, source: HeardWords, domains: list[str]) -> pd.DataFrame:
    first = answers[(answers["policy"] == answers["policy"].min()) & (answers["prompt"] < SHOWN_PROMPTS)]
    first = first.drop_duplicates("prompt").assign(kind="first")
    known = answers["answer"].map(lambda text: sum(1 for _ in source.known_words(text)))
    texts = answers["answer"].tolist()
    truth = source.true_reward(source.judge(texts, texts, np.zeros(len(texts), dtype=int)), texts, texts)
    best = answers.loc[[np.where(known >= 3, truth, -np.inf).argmax()]].assign(kind="gamed")
    table = pd.concat([first, best], ignore_index=True)
    table["rating"] = truth[[*first.index, *best.index]]
    return table.assign(domain=[domains[k] for k in table["prompt"]])
