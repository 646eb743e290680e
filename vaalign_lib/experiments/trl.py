"""The experiment of notebook 09: PPO of this library, RLOO and GRPO of TRL, with and without variances.

It is made in the embedded world whatever the profile; rewards are in units of the reference policy's.
"""

from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from vaalign_lib.data.pairs import EMBEDDED
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.conditions import JUDGES, METHODS
from vaalign_lib.experiments.policies import kl_of, prompt_sets
from vaalign_lib.experiments.references import reference
from vaalign_lib.jobs import run_jobs
from vaalign_lib.profiles import Profile, Study, load_profile
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.statistics.tests import Estimate, mean
from vaalign_lib.theory.tabular import exact_policy, grpo_fixed_point, ppo_fixed_point
from vaalign_lib.training.matched_kl import MatchError, match_kl
from vaalign_lib.training.objectives import Task
from vaalign_lib.training.one_token import BETA, one_token_problem
from vaalign_lib.training.run import embedded_task
from vaalign_lib.training.trl_runs import (
    ARCHITECTURE,
    TRAINERS,
    Setting,
    Setup,
    Variant,
    one_token_shares,
    write_policies,
)

JUDGE = JUDGES["judge-b"]
ALGORITHMS = ("ppo", *TRAINERS)
# The modules whose code decides what policies become.
CODE = ("vaalign_lib.training.trl_runs", "vaalign_lib.rewards.simulated_judge")
NOT_OF_A_SETTING: dict[str, Any] = {  # what of a profile changes nothing in a setting's policies
    "trl": {"seeds", "matched_kl", "one_token_steps"},
    "policies": {"runs", "judges", "data", "matching"},
}
FACTORS = (0.3, 0.55, 1.0, 1.8, 3.3)  # of vanilla's coefficient, in the pilot of a search
ATTEMPTS, TOLERANCE = 4, 0.05  # of a search, and how near its KL is to come
VARIANTS = (  # on one token
    Variant("rloo", "detached", ppo_fixed_point),
    Variant("grpo", "detached", ppo_fixed_point),
    Variant("grpo", "detached", grpo_fixed_point, corrected=False),
    Variant("rloo", "exact", exact_policy),
    Variant("grpo", "exact", exact_policy),
)
SOLUTIONS = {"detached": ppo_fixed_point, "uncorrected": grpo_fixed_point, "exact": exact_policy}


def in_the_world(profile: Profile) -> Profile:
    """Return a profile whose policies are tiny ones of the embedded world."""
    if profile.reference.models[ARCHITECTURE] == "tiny" and profile.policies.data == EMBEDDED:
        return profile
    return load_profile("embedded").model_copy(update={"trl": profile.trl})


def setup_of(study: Study) -> Setup:
    """Return what all policies share: where they start, prompts, judge and gold."""
    world = World(study.seed)
    asked, judge = prompt_sets(study.profile, study.seed), stand_ins(world)[JUDGE]
    return Setup(
        study.profile,
        study.seed,
        reference(study, ARCHITECTURE),
        embedded_task(study.profile, judge, world),
        Task(asked.evaluation, judge, asked.gold),
    )


def train_setting(study: Study, setting: Setting) -> Path:
    """Return the folder of a setting's policies (see `write_policies`), trained now or before."""

    def write(folder: Path, **_: Any) -> None:
        write_policies(folder, setup_of(study), setting)

    settings = study.profile.model_dump(include={"trl", "policies", "reference"}, exclude=NOT_OF_A_SETTING)
    settings["policies"]["training"] = settings["policies"]["training"][ARCHITECTURE]
    config = {"setting": asdict(setting), "judge": JUDGE, "seed": study.seed, "settings": settings}
    name = f"{setting.algorithm}-{setting.objective.replace('_', '-')}"
    return study.store.folder(name, write, config, {"reference": reference(study, ARCHITECTURE)}, CODE)


# --- the comparison -------------------------------------------------------------------------------------

Trained = list[tuple[Setting, Path]]


def compare(study: Study, workers: int | str) -> Trained:
    """Return both methods of every algorithm, each with its folder; with `matched_kl` the variance-aware
    coefficients are those that leave vanilla's KL.
    """
    reference(study, ARCHITECTURE)
    sizes = study.profile.trl
    share = sizes.beta, tuple(range(sizes.seeds))
    vanilla, aware = ([Setting(algorithm, one, *share) for algorithm in ALGORITHMS] for one in METHODS)

    def in_workers(jobs: list[Any]) -> Trained:
        steps = len(jobs) * sizes.seeds
        return list(run_jobs(dict(enumerate(jobs)), workers, steps, "policies", study.store.root).values())

    if not sizes.matched_kl:
        return in_workers([partial(_trained, study, one) for one in vanilla + aware])
    known = in_workers([partial(_trained, study, one) for one in vanilla])
    targets = zip(aware, [kl_of(folder) for _, folder in known], strict=True)
    return known + in_workers([partial(_matched, study, one, kl) for one, kl in targets])


def _trained(study: Study, setting: Setting) -> tuple[Setting, Path]:
    return setting, train_setting(study, setting)


def _matched(study: Study, setting: Setting, target: float) -> tuple[Setting, Path]:
    """Return the setting whose policies end nearest to a KL: a pilot of two, then a few tries."""
    made: dict[float, Path] = {}

    def train(beta: float) -> float:
        made[beta] = train_setting(study, replace(setting, beta=beta))
        return kl_of(made[beta])

    betas = [factor * setting.beta for factor in FACTORS]
    few = replace(setting, policies=setting.policies[:2])
    kls = [kl_of(train_setting(study, replace(few, beta=one))) for one in betas]
    with suppress(MatchError):
        match_kl(train, betas, kls, target, ATTEMPTS, TOLERANCE)
    nearest = min(made, key=lambda beta: abs(kl_of(made[beta]) - target))
    return replace(setting, beta=nearest), made[nearest]


def table_of(found: Trained, name: str) -> pd.DataFrame:
    """Return a table of all settings, `policies` or `log`, with their algorithm, objective and beta."""
    read = [(one, pd.read_parquet(folder / f"{name}.parquet")) for one, folder in found]
    tables = [
        table.assign(algorithm=one.algorithm, objective=one.objective, beta=one.beta) for one, table in read
    ]
    return pd.concat(tables, ignore_index=True)


def differences(policies: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return variance-aware minus vanilla of a column, by policy (rows) and algorithm (columns)."""
    wide = policies.pivot(index="policy", columns=["algorithm", "objective"], values=measure)
    return wide.xs("variance_aware", axis=1, level=1) - wide.xs("vanilla", axis=1, level=1)


def mean_difference(policies: pd.DataFrame, measure: str) -> Estimate:
    """Return the mean over algorithms of variance-aware minus vanilla, with its interval over policies;
    those of one number share their random start, so they are taken together.
    """
    return mean(differences(policies, measure).mean(axis=1))


def kl_gap(policies: pd.DataFrame) -> float:
    """Return how far the methods' mean KLs are apart at most, relative to vanilla's, over algorithms."""
    kl = policies.groupby(["algorithm", "objective"])["kl"].mean().unstack()
    return float((kl["variance_aware"] / kl["vanilla"] - 1).abs().max())


# --- one token ------------------------------------------------------------------------------------------


def one_token_ends(seed: int, steps: int, workers: int, folder: Path) -> pd.DataFrame:
    """Train every variant on one token; return a row for each variant and word, with the variant's own
    solution in `expected`, and all three of `SOLUTIONS`.
    """
    jobs = {one: partial(one_token_shares, one, seed, steps) for one in VARIANTS}
    middle, variance = one_token_problem(seed)
    tables = []
    for variant, (before, after) in run_jobs(jobs, workers, 0, "trainers on one token", folder).items():
        table = pd.DataFrame({"reward": middle, "variance": variance, "reference": before, "trained": after})
        for name, solution in {"expected": variant.solution, **SOLUTIONS}.items():
            table[name] = solution(middle, variance, before, BETA)
        tables.append(table.rename_axis("word").reset_index().assign(trainer=variant.name))
    return pd.concat(tables, ignore_index=True)


def distances(ends: pd.DataFrame) -> pd.DataFrame:
    """Return each trainer's total variation distance to its own solution, to the nearest other, and the
    reference's to its own.
    """
    rows = []
    for trainer, one in ends.groupby("trainer", sort=False):
        own, *others = (0.5 * (one["trained"] - one[name]).abs().sum() for name in ("expected", *SOLUTIONS))
        start = 0.5 * (one["reference"] - one["expected"]).abs().sum()
        other = min(value for value in others if value != own)
        rows.append({"trainer": trainer, "own": own, "other": other, "start": start})
    return pd.DataFrame(rows)
