"""`vaalign compare`: policies of several methods, trained from one's own model, prompts and rewards, matched
in their KL and evaluated; every stack is kept, so that what was stopped goes on.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo

from vaalign_lib.data.pairs import prompts_of
from vaalign_lib.experiments.answer import Answer
from vaalign_lib.profiles import (
    PPO,
    Coefficient,
    Count,
    Evaluation,
    Matching,
    PolicyTraining,
    Profile,
    ProfileError,
    Rate,
    Sampling,
    Section,
    listed,
    load_profile,
    read_yaml,
)
from vaalign_lib.rewards.base import Members, RewardSource, Truth
from vaalign_lib.rewards.ensemble import ClassifierEnsemble, SequenceClassifierReward, load_ensemble
from vaalign_lib.statistics.tests import rounded
from vaalign_lib.store import RunStore, content_key, is_hub_name, read_once
from vaalign_lib.training import matched_kl
from vaalign_lib.training.evaluation import Evaluator
from vaalign_lib.training.objectives import OBJECTIVES, Method, Task
from vaalign_lib.training.run import policy_trainer, write_stack

_LOG = logging.getLogger(__name__)
CODE = ("vaalign_lib.training.run", "vaalign_lib.training.matched_kl")
PROBES = 8  # texts by whose judgement a source of rewards is known again
HELD_OUT = 4  # every fourth prompt is evaluated on and not trained on, where there are enough


class Sizes(Section):
    """How policies are trained, evaluated and matched."""

    training: PolicyTraining = PolicyTraining(ppo=PPO(iterations=100, batch_size=32, mini_batch_size=32))
    sampling: Sampling = Sampling()
    warm_up: Count = 512  # responses of the reference for the critic and the unit of reward
    critic: Literal["own_states", "reference_states"] = "reference_states"
    evaluation: Evaluation = Evaluation(prompts=64, samples=4)
    matching: Matching = Matching(factors=[0.3, 0.55, 1.0, 1.8, 3.3], each=4, tolerance=0.05)
    together: Count | None = None  # policies that are trained at a time, where memory holds no more


def compare(
    task: Task | Callable[[int], Task],
    methods: Sequence[str] | Mapping[str, Method] = ("vanilla", "variance_aware"),
    policies: int = 16,
    match_kl: bool = True,
    *,
    model: str | Path | Callable[[int], str | Path],
    folder: str | Path,
    evaluation: Sequence[str] | None = None,
    sizes: Sizes | None = None,
    seeds: Sequence[int] = (0,),
) -> Answer:
    """Train policies of each method from one model, and compare them with the first method's.

    With `match_kl` the other methods' coefficients are those that leave the first one's KL. Policies are
    compared by the task's gold, or without it by the true reward of its source. `evaluation` are prompts that
    are not trained on, by default every fourth of the task's. Each seed is a world: a repeat, or, where task
    and model are functions of the seed, a task and a start of its own.

    What is done is kept in `folder`, under a key of all settings, files, the library's code and what the
    source says of some texts; called again, it goes on from there.
    """
    named = dict(methods) if isinstance(methods, Mapping) else {name: Method(name) for name in methods}
    if len(named) < 2:
        raise ValueError(f"methods: expected at least two, the first to compare with, got {', '.join(named)}")
    tables, starts = [], []
    for seed in seeds:
        one = task if isinstance(task, Task) else task(seed)
        start = model(seed) if callable(model) else model
        run = _Run(one, start, policies, sizes or Sizes(), seed, RunStore(Path(folder) / "store"), evaluation)
        with read_once():
            world = run.compared(named, match_kl)
        tables.append(world.assign(world=seed))
        starts.append(run.reference(next(iter(named.values()))).assign(world=seed))
    columns = ["world", "method", "policy", "beta", "outcome", "outcome_error", "kl", "length", "variance"]
    return Answer(pd.concat(tables, ignore_index=True)[columns], pd.concat(starts, ignore_index=True))


@dataclass(frozen=True)
class _Run:
    """The stacks of one world."""

    task: Task
    model: str | Path
    policies: int
    sizes: Sizes
    seed: int
    store: RunStore
    evaluation: Sequence[str] | None

    def __post_init__(self) -> None:
        if self.policies < 3:
            raise ValueError(f"policies: expected at least three for a variance, got {self.policies}")

    @cached_property
    def prompts(self) -> tuple[list[str], list[str]]:
        """What is trained on and what is evaluated on."""
        asked, most = list(dict.fromkeys(self.task.prompts)), self.sizes.evaluation.prompts
        if self.evaluation is not None:
            return asked, list(dict.fromkeys(self.evaluation))[:most]
        if len(asked) < 2 * HELD_OUT:
            return asked, asked[:most]
        return [one for k, one in enumerate(asked) if k % HELD_OUT], asked[::HELD_OUT][:most]

    @cached_property
    def profile(self) -> Profile:
        """A profile with the sizes of this comparison; of the rest of it nothing is used."""
        base, sizes = load_profile("embedded"), self.sizes
        own = {"count": self.policies, "training": {"own": sizes.training}}
        own |= {"warm_up": sizes.warm_up, "critic": sizes.critic, "sampling": sizes.sampling}
        return base.model_copy(update={"policies": base.policies.model_copy(update=own)})

    @cached_property
    def known_by(self) -> dict[str, Any]:
        """What a key says of source, gold and prompts: what they answer about some prompts as responses."""
        texts = list(self.task.prompts)[:PROBES]
        judged = self.task.judge(texts, texts, np.arange(len(texts)) % self.policies)
        answers = asdict(judged) | self.task.truths(judged, texts, texts)
        numbers = {name: one for name, one in answers.items() if isinstance(one, np.ndarray)}
        probe = {name: [rounded(float(x), 5) for x in one.ravel()] for name, one in numbers.items()}
        kind = {"members": isinstance(judged, Members), "variance_of": answers.get("variance_of")}
        return {"prompts": content_key(prompts=self.prompts), "probe": probe} | kind

    def compared(self, methods: Mapping[str, Method], match: bool) -> pd.DataFrame:
        """Return the policies of every method, as evaluated."""
        if match and self.sizes.training.ppo.adaptive_kl is not None:
            raise ValueError("match_kl: adaptive_kl moves the coefficients itself; leave out one of the two")
        first, *others = methods
        tables = {first: self.trained(methods[first])}
        for name in others:
            known = tables[first]["kl"].mean()
            tables[name] = self.matched(methods[name], known) if match else self.trained(methods[name])
            _LOG.info("%s: KL %.3g nats, %s %.3g", name, tables[name]["kl"].mean(), first, known)
        joined = pd.concat([one.assign(method=name) for name, one in tables.items()], ignore_index=True)
        kind = "gold" if self.task.gold is not None else "true_reward"
        return joined.rename(columns={kind: "outcome", f"{kind}_error": "outcome_error"})

    def trained(self, method: Method, count: int | None = None) -> pd.DataFrame:
        """Return policies of a method as evaluated, trained now or before."""
        together = self.sizes.together or self.policies
        firsts = range(0, count or self.policies, together)
        parts = [range(first, min(first + together, count or self.policies)) for first in firsts]
        return pd.concat([self._read(method, part, "policies") for part in parts], ignore_index=True)

    def reference(self, method: Method) -> pd.DataFrame:
        """Return evaluations of the start, made beside a method's first policies."""
        table = self._read(
            method, range(min(self.sizes.together or self.policies, self.policies)), "reference"
        )
        return table.rename(columns={"gold" if self.task.gold is not None else "true_reward": "outcome"})

    def _read(self, method: Method, part: range, name: str) -> pd.DataFrame:
        """Return a table of some policies' folder; numbers of a method that are one for each are cut."""
        each = ("beta", "learning_rate", "strength")
        cut: dict[str, Any] = {
            k: v[part.start : part.stop] for k in each if isinstance(v := getattr(method, k), Sequence)
        }
        method = replace(method, **cut)

        def write(folder: Path, scratch: Path, **_: Any) -> None:
            task = replace(self.task, prompts=self.prompts[0])
            options: dict[str, Any] = {"policies": list(part), "seed": self.seed}
            trainer = policy_trainer(self.profile, "own", self.model, task, method, **options)
            asked = replace(task, prompts=self.prompts[1])
            sampling, samples = self.sizes.sampling, self.sizes.evaluation.samples
            of_evaluation = trainer.reference, trainer.tokenizer, asked, sampling, samples, self.seed
            evaluator = Evaluator(*of_evaluation, trainer.stack.device)
            write_stack(folder, scratch, trainer, evaluator)
            evaluator.references(list(part)).to_parquet(folder / "reference.parquet")

        sizes = self.sizes.model_dump(exclude={"together", "matching"})
        own = {"method": asdict(method), "objective": _code_of(method.objective), "policies": list(part)}
        config = own | {"sizes": sizes, "seed": self.seed, "known_by": self.known_by}
        kept = self.store.resumable(method.objective, write, config, {"model": Path(self.model)}, CODE)
        beta = self.sizes.training.ppo.init_kl_coef if method.beta is None else method.beta
        return pd.read_parquet(kept / f"{name}.parquet").assign(beta=beta)

    def matched(self, method: Method, target: float) -> pd.DataFrame:
        """Return policies with the coefficient, of those tried, whose KL is nearest to the target."""
        start = self.sizes.training.ppo.init_kl_coef if method.beta is None else method.beta
        if isinstance(start, Sequence) or not start > 0:
            raise ValueError(f"match_kl: {method.objective} needs one coefficient above 0, got {start}")
        matching, made = self.sizes.matching, {}
        betas = [start * factor for factor in matching.factors]
        cells = matched_kl.Grid([1.0], betas, max(1, min(matching.each, self.policies // len(betas)))).cells[
            "beta"
        ]
        pilot = self.trained(replace(method, beta=cells.tolist()), len(cells))
        kls = pilot.groupby("beta")["kl"].mean()

        def train(beta: float) -> float:
            made[beta] = self.trained(replace(method, beta=beta))
            return float(made[beta]["kl"].mean())

        with suppress(matched_kl.MatchError):
            matched_kl.match_kl(
                train, kls.index.tolist(), kls.tolist(), target, matching.attempts, matching.tolerance
            )
        return made[min(made, key=lambda beta: abs(made[beta]["kl"].mean() - target))]


def _code_of(objective: str) -> str:
    """Return what a key says of an objective: nothing of the library's, of one's own its instructions."""
    function = OBJECTIVES[objective]
    if function.__module__.startswith("vaalign_lib."):
        return ""
    code = function.__code__
    return content_key(
        code=code.co_code.hex(), names=code.co_names, constants=[repr(one) for one in code.co_consts]
    )


# --- from a file ----------------------------------------------------------------------------------------


def _beside(value: str, info: ValidationInfo) -> str:
    """Accept a file or folder beside the settings, or a name on the hub."""
    path = (info.context or {}).get("folder", Path()) / value
    if path.exists():
        return str(path.resolve())
    if not is_hub_name(value):
        raise ValueError(f"there is no {path}, and it is no name on the hub")
    return value


Place = Annotated[str, AfterValidator(_beside)]


class Settings(Section):
    """A method in a file: its objective, if that is not its name, and what it is trained with."""

    objective: str | None = None
    beta: Coefficient | None = None
    learning_rate: Rate | None = None
    strength: Annotated[float, Field(ge=0)] = 1.0
    credit: Literal["sequence", "token"] = "sequence"
    standardized: bool = True


class Plan(Sizes):
    """What a file says to `vaalign compare`."""

    policy: Place = Field(description="the model that all start from")
    prompts: Place = Field(description="a file of prompts")
    rewards: Annotated[list[Place], Field(min_length=1)] = Field(
        description="two or more sequence classifiers, or a saved ensemble"
    )
    methods: dict[str, Settings | None] = Field(description="two or more; the first is compared with")
    gold: Place | None = None  # a classifier that is not trained with, by which policies are compared
    evaluation_prompts: Place | None = None
    policies: Count = 16
    match_kl: bool = True
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default=[0])
    max_length: Count = 4096  # tokens of prompt and response that reward models read

    @property
    def named(self) -> dict[str, Method]:
        """The methods by name."""
        given = {name: (one or Settings()).model_dump() for name, one in self.methods.items()}
        return {name: Method(**one | {"objective": one["objective"] or name}) for name, one in given.items()}


def read_plan(path: str | Path) -> Plan:
    """Read a file for `vaalign compare`; `ProfileError` says what is wrong with it."""
    if not Path(path).is_file():
        raise ProfileError(f"{path}: there is no such file")
    try:
        return Plan.model_validate(read_yaml(Path(path)), context={"folder": Path(path).parent})
    except ValidationError as error:
        raise ProfileError(f"{path}: {listed(error, Plan)}") from None


def source_of(plan: Plan, gold: Truth | None) -> RewardSource:
    """Return the rewards that a plan names; without gold their true reward is the members' mean."""
    if len(plan.rewards) > 1:
        return ClassifierEnsemble.load(plan.rewards, gold, plan.max_length)
    (name,) = plan.rewards
    if not (Path(name) / "ensemble.json").is_file():
        raise ValueError(
            f"rewards: {name} is one model, without a variance; give two or more, or an ensemble"
        )
    ensemble = load_ensemble(name)

    def of_members(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        return ensemble.scores(prompts, responses, np.zeros(len(responses), dtype=np.int64)).mean(1)

    return replace(ensemble, truth=gold or of_members)


def run_plan(plan: Plan, folder: Path) -> Answer:
    """Train and compare what a plan says."""
    gold = None if plan.gold is None else SequenceClassifierReward.load(plan.gold, plan.max_length)
    task = Task(prompts_of(plan.prompts, 10**6), source_of(plan, gold), gold, population=plan.policies)
    asked = None if plan.evaluation_prompts is None else prompts_of(plan.evaluation_prompts, 10**6)
    sizes = Sizes.model_validate(plan.model_dump(include=set(Sizes.model_fields)), strict=False)
    where: dict[str, Any] = {"model": plan.policy, "folder": folder, "evaluation": asked, "seeds": plan.seeds}
    return compare(task, plan.named, plan.policies, plan.match_kl, **where, sizes=sizes)
