r"""The variance-aware penalty in TRL's own RLOO and GRPO, for the user's own training script.

Both trainers penalize a completion y by beta sigma^2(y) times its KL to the reference policy, where the
stock trainers have beta; sigma^2 is what a reward function logs for every completion as
`reward_variance` (see `trl_rewards`). Nothing of TRL is copied: where it multiplies by its coefficient,
it finds one that weighs the rows, and an error is raised if a release no longer multiplies.

On one-token completions they converge to

    RLOO                          pi_0 exp((R - c) / (beta sigma^2))           `tabular.ppo_fixed_point`
    GRPO                          the same, for TRL 1.16 corrects its KL by default
    GRPO, use_bias_correction_kl=False
                                  R - beta sigma^2 (1 - pi_0 / pi) = nu        `tabular.grpo_fixed_point`
    penalty="exact" in both       the optimum of Equation (5)                  `tabular.exact_policy`

On longer ones RLOO penalizes the whole completion's log ratio, so this holds for completions; GRPO
penalizes each token for its own KL alone, divides by lengths as its `loss_type` says and, unless
`scale_rewards="none"`, rewards (not the penalty) by their deviation: its beta is in other units.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

VARIANCE = "reward_variance"  # the column that a reward function logs
Penalty = Literal["detached", "exact"]


class VarianceError(ValueError):
    """Variances that are missing, or are none."""


class IncompatibleTrlError(RuntimeError):
    """A release of TRL does not do what these trainers rely on."""


class _VarianceAware:
    """What both trainers share: they ask for variances when rewards are computed."""

    def __init__(self, *args: Any, penalty: Penalty = "detached", **options: Any) -> None:
        """Begin as the stock trainer does.

        Args:
            args: of the stock trainer.
            penalty: `detached`, the penalty as a reward, as the paper's code has it; or `exact`, with the
                gradient of Equation (5), which costs every completion beta sigma^2 once more.
            options: of the stock trainer.

        Raises:
            ValueError: there is nothing to weigh, or the trainer's settings and the penalty do not fit.
        """
        if penalty not in get_args(Penalty):
            raise ValueError(
                f"penalty: expected one of {', '.join(get_args(Penalty))}, got {penalty!r}"
            )
        super().__init__(*args, **options)
        if not self.beta > 0:  # type: ignore[has-type]
            raise ValueError(
                f"args.beta: a penalty that grows with the variance needs a coefficient above 0, got "
                f"{self.beta}"  # type: ignore[has-type]
            )
        self.penalty = penalty
        self.beta = float(self.beta)  # type: ignore[has-type]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """Return what the stock trainer does (completions of all processes, reward functions), and keep
        the variances of all processes (completions,), 0 where there is no reward.
        """
        rewards: Tensor = super()._calculate_rewards(  # type: ignore[misc]
            inputs, prompts, completions, completion_ids_list
        )
        mine = slice(self._first(len(prompts)), self._first(len(prompts)) + len(prompts))
        self._rewarded = ~rewards.isnan().all(dim=1)
        logged = self._pending_extra_logs.get(VARIANCE)  # type: ignore[attr-defined]
        own = checked_variances(logged, self._rewarded[mine].tolist())
        self._log_metric(f"{VARIANCE}/mean", sum(own) / len(own))  # type: ignore[attr-defined]
        local = torch.tensor(own, dtype=rewards.dtype, device=rewards.device)
        self._variances = self.accelerator.gather(local)  # type: ignore[attr-defined]
        return rewards

    def _first(self, count: int) -> int:
        """Return the place of this process's first completion among those of all."""
        return int(self.accelerator.process_index) * count  # type: ignore[attr-defined]


class VarianceAwareRLOOTrainer(_VarianceAware, RLOOTrainer):
    """TRL's RLOO with rewards R - beta sigma^2 ln(pi / pi_0), or that minus beta sigma^2."""

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)
        self.beta = _Weighing(float(self.beta), self._variances, self.penalty == "exact")
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self.beta = _used(self.beta, "RLOOTrainer._generate_and_score_completions")
        return batch


class VarianceAwareGRPOTrainer(_VarianceAware, GRPOTrainer):
    """TRL's GRPO with beta sigma^2 times the KL in its loss, or with that and advantages that pay
    beta sigma^2; variances travel with their rows.
    """

    def __init__(self, *args: Any, penalty: Penalty = "detached", **options: Any) -> None:
        super().__init__(*args, penalty=penalty, **options)
        if penalty == "exact" and not self.args.use_bias_correction_kl:
            raise ValueError(
                "penalty: GRPO's KL without its correction follows another gradient than that "
                "of Equation (5); for 'exact' set use_bias_correction_kl=True in GRPOConfig"
            )

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        first = self._first(len(batch["advantages"]))
        mine = slice(first, first + len(batch["advantages"]))
        batch[VARIANCE] = self._variances[mine]
        if self.penalty == "exact":
            batch["advantages"] = batch["advantages"] - self.beta * self._excess()[mine]
        return batch

    def _excess(self) -> Tensor:
        """Return by how much each variance is above its group's mean (completions of all processes,)."""
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        groups = self._variances.view(-1, size)
        counted = self._rewarded.view(-1, size)
        mean = groups.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        return ((groups - mean) * counted).view(-1)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.beta = _Weighing(float(self.beta), inputs[VARIANCE])
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            used, self.beta = self.beta, float(self.beta)
        _used(used, "GRPOTrainer._compute_loss")
        return loss


def checked_variances(logged: Any, rewarded: list[bool]) -> list[float]:
    """Return the variance of every completion, 0 where there is no reward.

    Args:
        logged: what a reward function logged, or None.
        rewarded: which completions have a reward.

    Raises:
        VarianceError: they are missing, or one is not a finite number of at least 0.
    """
    if logged is None:
        raise VarianceError(
            f"{VARIANCE}: no reward function logged it; call log_extra('{VARIANCE}', variances) in one, "
            "or wrap one by trl_rewards.with_variances"
        )
    values = list(logged)
    if len(values) != len(rewarded):
        raise VarianceError(
            f"{VARIANCE}: expected one for each of {len(rewarded)} completions, got {len(values)}; one "
            "reward function logs them, once"
        )
    found = []
    for k, (value, counts) in enumerate(zip(values, rewarded, strict=True)):
        number = float("nan") if value is None else float(value)
        if counts and not 0 <= number < float("inf"):
            raise VarianceError(
                f"{VARIANCE}: completion {k} of {len(values)} has {value}; expected a finite number of "
                "at least 0, or no reward (None) either"
            )
        found.append(number if counts else 0.0)
    return found


class _Weighing(float):
    """A coefficient that is a number, and multiplies the rows of a tensor by weights of their own."""

    def __new__(cls, value: float, weights: Tensor, once: bool = False) -> "_Weighing":
        """Make one.

        Args:
            value: the number.
            weights: of the rows (rows,).
            once: whether a row's weight counts once more beside what it multiplies.
        """
        number = super().__new__(cls, value)
        number.weights, number.once, number.used = weights, once, False
        return number

    weights: Tensor
    once: bool
    used: bool

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return float(self) * other
        self.used = True
        weights = self.weights.view(-1, *[1] * (other.dim() - 1))
        return float(self) * (weights * (other + 1 if self.once else other))

    __rmul__ = __mul__


def _used(coefficient: float, place: str) -> float:
    """Return a coefficient as a plain number.

    Raises:
        IncompatibleTrlError: no rows were weighed with it.
    """
    if isinstance(coefficient, _Weighing) and not coefficient.used:
        raise IncompatibleTrlError(
            f"{place} does not multiply the KL by self.beta in this release of trl; variances would be "
            "left out. These trainers were made for trl>=1.16,<1.17"
        )
    return float(coefficient)
