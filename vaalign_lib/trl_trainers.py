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

with a beta that in GRPO is G / (G - 1) times that of its configuration: of G completions each counts in
the mean that it is compared with, so the reward's gradient is (1 - 1/G) times as large, and the penalty's
is not. And it holds with `scale_rewards="none"`; else rewards, not the penalty, are divided by their
deviation, and beta is in other units for every prompt.

On longer completions RLOO penalizes the whole completion's log ratio, so this holds for completions; GRPO
penalizes each token for its own KL alone, and divides by lengths as its `loss_type` says.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

VARIANCE = "reward_variance"  # the column that a reward function logs
LARGEST = 1e18  # variance: its square, as norms of gradients have it, is still a number in float32
GIVEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")  # by trl, to rewards
Penalty = Literal["detached", "exact"]
_MADE = "variances would be lost. These trainers were made for trl>=1.16,<1.17"


class VarianceError(ValueError):
    """A completion without a variance, or with one that is not a finite number of at least 0."""


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
        self.penalty = penalty
        if (given := options.get("args")) is not None:
            self._check(given)  # before a large model is loaded
        super().__init__(*args, **options)
        self._check(self.args)  # type: ignore[attr-defined]
        for name in ("train_dataset", "eval_dataset"):
            check_columns(name, getattr(self, name))
        self.beta: float = float(self.beta)  # type: ignore[has-type]
        self._variances: Tensor | None = None

    def _check(self, settings: Any) -> None:
        if not 0 < settings.beta < float("inf"):
            raise ValueError(
                "args.beta: a penalty that grows with the variance needs a finite coefficient above 0, "
                f"got {settings.beta}"
            )

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """Return what the stock trainer does (completions of all processes, reward functions), and keep
        the variances of all processes (completions,). A completion whose variance is None is left out.
        """
        pending = self._pending_extra_logs  # type: ignore[attr-defined]
        rewards: Tensor = super()._calculate_rewards(  # type: ignore[misc]
            inputs, prompts, completions, completion_ids_list
        )
        rewarded = ~rewards[self._mine(len(prompts))].isnan().all(dim=1)
        try:
            logged = summed(pending.get(VARIANCE), len(prompts), self.reward_weights.tolist())  # type: ignore[attr-defined]
            own = checked_variances(logged, rewarded.tolist())
        except VarianceError:
            pending.clear()
            raise
        if len(pending[VARIANCE]) != len(
            own
        ):  # of several functions; trl's table has one a completion
            pending[VARIANCE][:] = own
        known = [one for one in own if one is not None]
        self._log_metric(f"{VARIANCE}/mean", sum(known) / max(len(known), 1))  # type: ignore[attr-defined]
        local = torch.tensor(
            [float("nan") if one is None else one for one in own],
            dtype=rewards.dtype,
            device=rewards.device,
        )
        variances = self.accelerator.gather(local)  # type: ignore[attr-defined]
        rewards[variances.isnan()] = torch.nan
        self._judged = ~variances.isnan()
        self._variances = variances.nan_to_num(0.0)
        return rewards

    def _mine(self, count: int) -> slice:
        """Return the places of this process's completions among those of all."""
        first = int(self.accelerator.process_index) * count  # type: ignore[attr-defined]
        return slice(first, first + count)

    def _known_variances(self) -> Tensor:
        """Return the variances of the completions that were just judged.

        Raises:
            IncompatibleTrlError: TRL got its rewards in another way.
        """
        if self._variances is None:
            raise IncompatibleTrlError(
                f"this release of trl gets no rewards from _calculate_rewards; {_MADE}"
            )
        return self._variances


class VarianceAwareRLOOTrainer(_VarianceAware, RLOOTrainer):
    """TRL's RLOO with rewards R - beta sigma^2 ln(pi / pi_0), or that minus beta sigma^2."""

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)
        weights = self._known_variances()
        self.beta = _Weighing(float(self.beta), weights, axes=1, once=self.penalty == "exact")
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._variances = None
        try:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            weighed, self.beta = self.beta, float(self.beta)
        self._known_variances()
        _used(weighed, "RLOOTrainer._generate_and_score_completions")
        return batch


class VarianceAwareGRPOTrainer(_VarianceAware, GRPOTrainer):
    """TRL's GRPO with beta sigma^2 times the KL in its loss, or with that and advantages that pay
    beta sigma^2; variances travel with their rows.
    """

    def _check(self, settings: Any) -> None:
        super()._check(settings)
        if self.penalty == "exact" and not settings.use_bias_correction_kl:
            raise ValueError(
                "penalty: GRPO's KL without its correction follows another gradient than that "
                "of Equation (5); for 'exact' set use_bias_correction_kl=True in GRPOConfig"
            )

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._variances = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mine = self._mine(len(batch["advantages"]))
        batch[VARIANCE] = self._known_variances()[mine]
        if self.penalty == "exact":
            batch["advantages"] = batch["advantages"] - self.beta * self._excess()[mine]
        return batch

    def _excess(self) -> Tensor:
        """Return by how much each variance is above the mean of the others of its group, 0 for what was
        not judged, or alone was (completions of all processes,).
        """
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = self._known_variances().view(-1, size)
        counted = self._judged.view(-1, size)
        others = counted.sum(1, keepdim=True) - 1
        mean = (groups.sum(1, keepdim=True) - groups) / others.clamp(min=1)  # not judged is 0
        return ((groups - mean) * (counted & (others > 0))).view(-1)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.beta = _Weighing(float(self.beta), inputs[VARIANCE], axes=2)
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            weighed, self.beta = self.beta, float(self.beta)
        _used(weighed, "GRPOTrainer._compute_loss")
        return loss


def summed(logged: Any, completions: int, weights: list[float]) -> Any:
    """Return what was logged, or, where several reward functions logged, the sum of their variances: that
    of a sum of independent rewards. What one of them could not judge has none (completions,).

    Args:
        logged: by all functions, one after the other.
        completions: how many there are.
        weights: of the reward functions.

    Raises:
        VarianceError: the functions have weights of their own.
    """
    times = len(logged or ()) // max(completions, 1)
    if not 1 < times <= len(weights) or len(logged) != times * completions:
        return logged
    if any(weight != 1 for weight in weights):
        raise VarianceError(
            f"{VARIANCE}: logged by {times} reward functions, which have the weights {weights}; with "
            "reward_weights let one function log the variance of the weighted sum"
        )
    each = zip(
        *(logged[k * completions : (k + 1) * completions] for k in range(times)), strict=True
    )
    return [None if None in row else sum(map(_number, row)) for row in each]


def checked_variances(logged: Any, rewarded: list[bool]) -> list[float | None]:
    """Return the variance of every completion, None where it is to be left out.

    Args:
        logged: what reward functions logged, or None.
        rewarded: which completions have a reward.

    Raises:
        VarianceError: they are missing, or one is not a number from 0 to `LARGEST`.
    """
    if logged is None:
        raise VarianceError(
            f"{VARIANCE}: no reward function logged it; call log_extra('{VARIANCE}', variances) in one, "
            "or wrap one by trl_rewards.with_variances"
        )
    values = list(logged)
    if len(values) != len(rewarded):
        raise VarianceError(
            f"{VARIANCE}: expected one for each of {len(rewarded)} completions, got {len(values)}; a "
            "reward function logs them once"
        )
    found: list[float | None] = []
    for k, (value, counts) in enumerate(zip(values, rewarded, strict=True)):
        if not counts or value is None:
            found.append(None)
        elif 0 <= _number(value) <= LARGEST:
            found.append(float(value))
        else:
            raise VarianceError(
                f"{VARIANCE}: completion {k} of {len(values)} has {value!r}; expected a finite number "
                f"from 0 to {LARGEST:g}, or None to leave this completion out"
            )
    return found


def _number(value: Any) -> float:
    """Return a number, or NaN for what is none, such as a text."""
    try:
        return float("nan") if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        return float("nan")


def check_columns(name: str, data: Any) -> None:
    """Check that no column of a data set takes the place of what TRL gives to reward functions.

    Raises:
        ValueError: one does.
    """
    for one in data.values() if isinstance(data, dict) else [data]:
        taken = sorted(set(getattr(one, "column_names", None) or ()) & set(GIVEN))
        if taken:
            raise ValueError(
                f"{name}: the column {taken[0]} has the name of something that trl gives to reward "
                "functions; rename it"
            )


class _Weighing(float):
    """A coefficient that is a number, and multiplies the rows of a tensor by weights of their own."""

    weights: Tensor
    axes: int
    once: bool
    products: int

    def __new__(cls, value: float, weights: Tensor, axes: int, once: bool = False) -> "_Weighing":
        """Make one.

        Args:
            value: the number.
            weights: of the rows (rows,).
            axes: of the tensor that it is going to be multiplied with.
            once: whether a row's weight counts once more beside what it multiplies.
        """
        number = super().__new__(cls, value)
        number.weights, number.axes, number.once, number.products = weights, axes, once, 0
        return number

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return float(self) * other
        if other.dim() != self.axes or len(other) != len(self.weights):
            raise IncompatibleTrlError(
                f"trl multiplies its coefficient by a tensor of shape {tuple(other.shape)}, not by one "
                f"with {self.axes} axes and {len(self.weights)} rows; {_MADE}"
            )
        self.products += 1
        weights = self.weights.view(-1, *[1] * (other.dim() - 1))
        return float(self) * (weights * (other + 1 if self.once else other))

    __rmul__ = __mul__


def _used(coefficient: float, place: str) -> None:
    """Check that rows were weighed, once.

    Raises:
        IncompatibleTrlError: they were not.
    """
    products = getattr(coefficient, "products", 0)
    if products != 1:
        raise IncompatibleTrlError(
            f"{place} multiplies the KL by self.beta {products} times, not once, in this release of trl; "
            f"{_MADE}"
        )
