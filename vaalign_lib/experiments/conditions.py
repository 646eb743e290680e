"""The conditions of notebook 04: which stacks are trained, and how compared.

A condition is one stack of policies: an architecture and a source of rewards (a row of the paper's
tables), a method, the protocol (do policies share their source?) and the penalty regime.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import numpy as np

from vaalign_lib.data.world.world import Disagreement
from vaalign_lib.papers.printed import PRINTED_WIDTHS, RANGES
from vaalign_lib.profiles import Profile, RunGroup, Sampling
from vaalign_lib.training.objectives import Method

Protocol = Literal["shared", "independent"]
Regime = Literal["equal_mean_penalty", "matched_kl", "as_printed"]
METHODS = ("vanilla", "variance_aware")
JUDGES = {
    "judge-a": "stand-in for Gemini 1.5 Flash",
    "judge-b": "stand-in for Gemini 2.0 Flash",
    "judge-c": "stand-in for DeepSeek V3",
}
ENSEMBLE_ROW, JUDGE_ROW = (("gpt2", "ensemble"), ("qwen2", "judge-b"))  # the second is that of Figure 7
ROWS = (ENSEMBLE_ROW, *product(("mistral", "qwen2"), JUDGES))
REFERENCE = "reference"  # in place of a method: the policy that all start from, evaluated as often


@dataclass(frozen=True)
class Condition:
    """One stack of policies.

    Attributes:
        architecture: of the policies.
        source: of their rewards: `ensemble` or one of `JUDGES`.
        objective: the method, or `reference` for evaluations of the policy they start from.
        protocol: `shared`: one source for all; `independent`: policy j has its own.
        regime: of the penalty; see `vaalign_lib.training.objectives.Method` and ../README.md.
        repeat: number of the whole stack; others draw other numbers, and other sources of their own.
        highest: R, the upper end of a judge's scale.
        widths: whether a judge's intervals are rescaled with R, or vary as much as Table 4 prints.
        disagreement: of the world's annotators; the last two are controls.
    """

    architecture: str
    source: str
    objective: str = "vanilla"
    protocol: Protocol = "shared"
    regime: Regime = "equal_mean_penalty"
    repeat: int = 0
    highest: int = 100
    widths: Literal["rescaled", "printed"] = "rescaled"
    disagreement: Disagreement = "none"

    @property
    def row(self) -> str:
        """The row of Tables 1 to 3."""
        return f"{self.architecture}-{self.source}"

    @property
    def name(self) -> str:
        """What a folder of the run store is called; conditions of the default go without saying."""
        plain = Condition(self.architecture, self.source)
        further = [
            str(value)
            for key, value in asdict(self).items()
            if value != getattr(plain, key) and key not in ("objective", "repeat", "highest")
        ]
        if self.highest != plain.highest:
            further.append(f"to-{self.highest}")
        if self.repeat:
            further.append(f"repeat-{self.repeat}")
        return "-".join([self.row, self.objective, *further]).replace("_", "-")

    @property
    def matched(self) -> bool:
        """Whether its coefficient is to be found."""
        return self.regime == "matched_kl" and self.objective != "vanilla"

    @property
    def pilot(self) -> "Condition":
        """Of what kind the pilot is that its coefficient is looked for in."""
        return Condition(self.architecture, self.source, "variance_aware", disagreement=self.disagreement)

    @property
    def vanilla(self) -> "Condition":
        """The stack that this one is compared with; matching changes only the variance-aware one."""
        same = replace(self, objective="vanilla")
        return replace(same, regime="equal_mean_penalty") if self.regime == "matched_kl" else same

    @property
    def start(self) -> "Condition":
        """The evaluations of the policy that it starts from, by the same true reward."""
        same = replace(self.vanilla, objective=REFERENCE)
        return replace(same, protocol="shared", repeat=0)


PRIMARY = tuple(
    Condition(*JUDGE_ROW, "variance_aware", protocol="independent", regime="matched_kl", repeat=repeat)
    for repeat in (0, 1)
)


# --- which runs there are -----------------------------------------------------------------------------


def _pair(run: Condition) -> list[Condition]:
    return [run.vanilla, replace(run, objective="variance_aware")]


def _rows() -> list[Condition]:
    return [run for row in ROWS for run in _pair(Condition(*row))]


def _printed_rows() -> list[Condition]:
    return [run for row in ROWS for run in _pair(Condition(*row, regime="as_printed"))]


def _matched() -> list[Condition]:
    return [run for row in (ENSEMBLE_ROW, JUDGE_ROW) for run in _pair(Condition(*row, regime="matched_kl"))]


def _independent(repeat: int = 0) -> list[Condition]:
    regimes: tuple[Regime, ...] = ("equal_mean_penalty", "matched_kl")
    return [
        run
        for row in (JUDGE_ROW, ENSEMBLE_ROW)
        for regime in regimes
        for run in _pair(Condition(*row, protocol="independent", regime=regime, repeat=repeat))
    ]


def _primary() -> list[Condition]:
    return [one for run in PRIMARY for one in _pair(run)]


def _ranges() -> list[Condition]:
    return [run for top in RANGES for run in _pair(Condition(*JUDGE_ROW, regime="as_printed", highest=top))]


def _printed_widths() -> list[Condition]:
    regimes: tuple[Regime, ...] = ("equal_mean_penalty", "as_printed")
    return [
        run
        for regime in regimes
        for top in RANGES[1:]  # at 100 they are those of the default
        for run in _pair(Condition(*JUDGE_ROW, regime=regime, highest=top, widths="printed"))
    ]


def _controls() -> list[Condition]:
    settings: tuple[Disagreement, ...] = ("poor", "good")
    protocols: tuple[Protocol, ...] = ("independent", "shared")
    return [
        run
        for protocol in protocols
        for where in settings
        for run in _pair(Condition(*JUDGE_ROW, protocol=protocol, regime="matched_kl", disagreement=where))
    ]


def _every_row() -> list[Condition]:
    regimes: tuple[Regime, ...] = ("matched_kl", "as_printed", "equal_mean_penalty")
    protocols: tuple[Protocol, ...] = ("independent", "shared")
    return [
        run
        for protocol in protocols
        for regime in regimes
        for row in ROWS
        for run in _pair(Condition(*row, protocol=protocol, regime=regime))
    ]


GROUPS: dict[RunGroup, Callable[[], list[Condition]]] = {
    "rows": _rows,
    "printed_rows": _printed_rows,
    "matched_kl": _matched,
    "independent": _independent,
    "ranges": _ranges,
    "primary": _primary,
    "second_seeds": partial(_independent, 1),
    "controls": _controls,
    "printed_widths": _printed_widths,
    "every_row": _every_row,
}


def plan(groups: Sequence[RunGroup]) -> list[Condition]:
    """Return the runs of groups, each once, with the evaluations of what they start from."""
    runs = [run for name in groups for run in GROUPS[name]()]
    return list(dict.fromkeys([*runs, *(run.start for run in runs)]))


# --- sources of reward ----------------------------------------------------------------------------------


def stretch_of(run: Condition) -> float:
    """Return by how much intervals vary more, relative to the scale, than those up to 100 do.

    Table 4's second column is the variance of the intervals' standard deviations. Were intervals only
    rescaled, it would be proportional to (R - 1)^2.
    """
    if run.widths == "rescaled":
        return 1.0
    relative = {top: np.sqrt(printed) / (top - 1) for top, printed in PRINTED_WIDTHS.items()}
    return float(relative[run.highest] / relative[100])


def method_of(run: Condition, beta: float | None) -> Method:
    """Return the method of a run; `as_printed` means raw units and trl's reward for each token."""
    if run.regime == "as_printed":
        return Method(run.objective, beta=beta, credit="token", standardized=False)
    return Method(run.objective, beta=beta)


def sampling_of(profile: Profile, run: Condition) -> Sampling:
    """Return how a run's policies write; `as_printed`, log-probabilities are those at temperature 1."""
    if run.regime != "as_printed":
        return profile.policies.sampling
    return profile.policies.sampling.model_copy(update={"log_probability_temperature": 1.0})
