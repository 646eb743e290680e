"""The conditions of notebook 04: which stacks are trained, and how compared.

A condition is one stack of policies: an architecture and a source of rewards (a row of the paper's
tables), a method, the protocol (do policies share their source?) and the penalty regime.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from vaalign_lib.data.world.world import Disagreement
from vaalign_lib.papers.printed import PRINTED_WIDTHS, RANGES
from vaalign_lib.profiles import Profile, RunGroup, Sampling
from vaalign_lib.training.objectives import Method

Protocol = Literal["shared", "independent"]
Regime = Literal["equal_mean_penalty", "matched_kl", "as_printed", "printed_gentle", "printed_fixed"]
METHODS = ("vanilla", "variance_aware")
PLACEBO = "placebo"  # variance-aware training by weights that know nothing of the judge's error
JUDGES = {
    "judge-a": "stand-in for Gemini 1.5 Flash",
    "judge-b": "stand-in for Gemini 2.0 Flash",
    "judge-c": "stand-in for DeepSeek V3",
}
ENSEMBLES = ("ensemble", "contrasts")  # the second with the variance within pairs as weights
URMES = ("urme-aleatoric", "urme-epistemic")  # a URME for every policy; which of its variances are weights
ENSEMBLE_ROW, JUDGE_ROW = (("gpt2", "ensemble"), ("qwen2", "judge-b"))  # the second is that of Figure 7
ROWS = (ENSEMBLE_ROW, *product(("mistral", "qwen2"), JUDGES))
PEOPLE_ROW = ("llama", "people")  # a pretrained model; every policy hears one person for each word
HEADS_ROW = ("llama", "heads")  # the same model; every policy has a head that has heard few people
WORLDS = 4  # of the primary endpoint
REFERENCE = "reference"  # in place of a method: the policy that all start from, evaluated as often


@dataclass(frozen=True)
class Condition:
    """One stack of policies."""

    architecture: str
    source: str  # of rewards: one of `ENSEMBLES`, `URMES` or `JUDGES`, or `people` or `heads`
    # the method, `placebo`, or `reference` for evaluations of the policy that they start from
    objective: str = "vanilla"
    protocol: Protocol = "shared"  # one source for all, or `independent`: policy j has its own
    regime: Regime = "equal_mean_penalty"  # of the penalty; see docs/results.md
    repeat: int = 0  # number of the whole stack; others draw other numbers, and other sources of their own
    world: int = 0  # number of the embedded world, whose reference and reward models are its own
    highest: int = 100  # R, the upper end of a judge's scale
    widths: Literal["rescaled", "printed"] = "rescaled"  # with R, or varying as much as Table 4 prints
    disagreement: Disagreement = "none"  # of the world's annotators; the others are controls

    @property
    def row(self) -> str:
        """The row of Tables 1 to 3."""
        return f"{self.architecture}-{self.source}"

    @property
    def title(self) -> str:
        """The row in words."""
        policy = {"gpt2": "GPT-2", "mistral": "Mistral", "qwen2": "Qwen2"}.get(
            self.architecture, self.architecture
        )
        return f"{policy}-like, {JUDGES.get(self.source, self.source)}"

    @property
    def name(self) -> str:
        """What a folder of the run store is called; conditions of the default go without saying."""
        plain, own = asdict(Condition(self.architecture, self.source)), asdict(self)
        further = [
            own[name] for name in ("protocol", "regime", "widths", "disagreement") if own[name] != plain[name]
        ]
        if self.highest != plain["highest"]:
            further.append(f"to-{self.highest}")
        if self.repeat:
            further.append(f"repeat-{self.repeat}")
        if self.world:
            further.append(f"world-{self.world}")
        return "-".join([self.row, self.objective, *further]).replace("_", "-")

    @property
    def matched(self) -> bool:
        """Whether its coefficient is to be found."""
        return self.regime == "matched_kl" and self.objective != "vanilla"

    @property
    def pilot(self) -> "Condition":
        """Of what kind the pilot is that its coefficient is looked for in."""
        plain = Condition(self.architecture, self.source, self.objective)
        return replace(plain, world=self.world, disagreement=self.disagreement)

    @property
    def looked_at(self) -> bool:
        """Whether its policies are evaluated on their way as well."""
        return (
            (self.architecture, self.source) == JUDGE_ROW
            and self.protocol == "independent"
            and not self.world
        )

    @property
    def printed(self) -> bool:
        """Whether it takes the paper's coefficients on raw rewards."""
        return self.regime in ("as_printed", "printed_gentle", "printed_fixed")

    @property
    def vanilla(self) -> "Condition":
        """The stack that this one is compared with; matching changes only those with a weighted penalty."""
        regime: Regime = "equal_mean_penalty" if self.regime == "matched_kl" else self.regime
        kinds = [one for one in (ENSEMBLES, URMES) if self.source in one]
        source = kinds[0][0] if kinds else self.source  # without weights they are one
        return replace(self, source=source, objective="vanilla", regime=regime)

    @property
    def start(self) -> "Condition":
        """The evaluations of the policy that it starts from, by the same true reward."""
        return replace(self.vanilla, objective=REFERENCE, protocol="shared", repeat=0)


# --- which conditions there are -------------------------------------------------------------------------

# Each group is the product of what its keys list, later keys turning faster; a value alone is a list of one.
GROUPS: dict[RunGroup, Mapping[str, Any]] = {
    "main_rows": {"row": [ENSEMBLE_ROW, JUDGE_ROW]},
    "rows": {"row": ROWS},
    "printed_rows": {"row": ROWS, "regime": "as_printed"},
    "matched_kl": {"row": [ENSEMBLE_ROW, JUDGE_ROW], "regime": "matched_kl"},
    "independent": {"row": [JUDGE_ROW, ENSEMBLE_ROW], "protocol": "independent", "regime": "matched_kl"},
    "contrasts": {"row": [("gpt2", "contrasts")], "protocol": "independent", "regime": "matched_kl"},
    "ranges": {
        "row": [JUDGE_ROW],
        "regime": ["as_printed", "printed_gentle", "printed_fixed"],
        "highest": RANGES,
    },
    "printed_ranges": {"row": [JUDGE_ROW], "regime": "as_printed", "highest": RANGES},
    # data/protocols/04.md
    "primary": {
        "world": range(WORLDS),
        "row": [JUDGE_ROW],
        "objective": ["variance_aware", PLACEBO],
        "protocol": "independent",
        "regime": "matched_kl",
    },
    "shared_worlds": {"world": range(1, WORLDS), "row": [JUDGE_ROW], "regime": "matched_kl"},
    "second_seeds": {
        "row": [JUDGE_ROW, ENSEMBLE_ROW],
        "protocol": "independent",
        "regime": ["equal_mean_penalty", "matched_kl"],
        "repeat": 1,
    },
    "controls": {
        "protocol": ["independent", "shared"],
        "disagreement": ["poor", "good"],
        "regime": "matched_kl",
        "row": [JUDGE_ROW],
    },
    "printed_widths": {  # at 100 they are those of the default
        "regime": ["equal_mean_penalty", "as_printed"],
        "highest": RANGES[1:],
        "widths": "printed",
        "row": [JUDGE_ROW],
    },
    "every_row": {
        "protocol": ["independent", "shared"],
        "regime": ["matched_kl", "as_printed", "equal_mean_penalty"],
        "row": ROWS,
    },
    # data/protocols/10.md
    "people": {
        "row": [PEOPLE_ROW],
        "objective": ["variance_aware", PLACEBO],
        "protocol": "independent",
        "regime": "matched_kl",
    },
    "people_heads": {
        "row": [HEADS_ROW],
        "objective": ["variance_aware", PLACEBO],
        "protocol": "independent",
        "regime": "matched_kl",
    },
    "urme": {  # data/protocols/06.md
        "row": [("gpt2", source) for source in URMES],
        "protocol": "independent",
        "regime": "matched_kl",
    },
}


def group(name: RunGroup) -> list[Condition]:
    """Return the conditions of a group that are compared with vanilla ones."""
    choices = [[one] if isinstance(one, str | int) else one for one in GROUPS[name].values()]
    found = []
    for cell in product(*choices):
        settings = {"objective": "variance_aware", **dict(zip(GROUPS[name], cell, strict=True))}
        architecture, source = settings.pop("row")
        found.append(Condition(architecture, source, **settings))
    return found


def plan(groups: Sequence[RunGroup]) -> list[Condition]:
    """Return the conditions of groups, each once after its vanilla one, then what they start from."""
    pairs = [one for name in groups for run in group(name) for one in (run.vanilla, run)]
    return list(dict.fromkeys([*pairs, *(one.start for one in pairs)]))


# --- sources of reward ----------------------------------------------------------------------------------


def stretch_of(condition: Condition) -> float:
    """Return by how much intervals vary more, relative to the scale, than those up to 100 do.

    Table 4's second column is the variance of the intervals' standard deviations. Were intervals only
    rescaled, it would be proportional to (R - 1)^2.
    """
    if condition.widths == "rescaled":
        return 1.0
    relative = {top: np.sqrt(printed) / (top - 1) for top, printed in PRINTED_WIDTHS.items()}
    return float(relative[condition.highest] / relative[100])


def method_of(condition: Condition, beta: float | None) -> Method:
    """Return a condition's method; as printed means raw units and trl's reward for each token."""
    objective = "variance_aware" if condition.objective == PLACEBO else condition.objective
    if condition.printed:
        return Method(objective, beta=beta, credit="token", standardized=False)
    return Method(objective, beta=beta)


def sampling_of(profile: Profile, condition: Condition) -> Sampling:
    """Return how policies write; as printed, log-probabilities are those at temperature 1."""
    if not condition.printed:
        return profile.policies.sampling
    return profile.policies.sampling.model_copy(update={"log_probability_temperature": 1.0})
