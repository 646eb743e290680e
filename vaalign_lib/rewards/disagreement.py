"""What the variance between reward models consists of (Appendix B, Figure 8)."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sample_variance(scores: Array) -> Array:
    """Return the sample variance over models of scores (responses, models): (responses,), ddof=1.

    Raises:
        ValueError: there are fewer than two models.
    """
    if np.ndim(scores) != 2 or np.shape(scores)[1] < 2:
        raise ValueError(
            f"scores: expected (responses, at least two models), got {np.shape(scores)}"
        )
    return np.asarray(np.var(scores, axis=1, ddof=1))


def difference_ratio(chosen: Array, rejected: Array) -> Array:
    """Return Var(chosen - rejected) / (Var(chosen) + Var(rejected)) over models (pairs,).

    It is 0 for models that are shifted copies of each other, 1 on average for unrelated scores, and up to
    2 for models that trade one response against the other.

    Args:
        chosen: scores (pairs, models) of the preferred responses.
        rejected: scores of the others.
    """
    _check_alike(chosen=chosen, rejected=rejected)
    apart = sample_variance(chosen) + sample_variance(rejected)
    return np.asarray(sample_variance(chosen - rejected) / apart)


def initial_share(initial: Array, final: Array) -> Array:
    """Return how much of the models' final deviations their initial ones explain (responses,).

    The squared correlation over models of the scores before and after training, for each response: 1 if
    training moved all models alike, 1 / (models - 1) on average if it left no trace of the start.

    Args:
        initial: scores (responses, models) of untrained models.
        final: scores of the same models after training.
    """
    _check_alike(initial=initial, final=final)
    before = initial - initial.mean(1, keepdims=True)
    after = final - final.mean(1, keepdims=True)
    product = (before * after).sum(1) ** 2
    return np.asarray(product / ((before**2).sum(1) * (after**2).sum(1)))


def between_ensembles(scores: Array) -> tuple[Array, Array]:
    """Return what each ensemble says about itself, and how ensembles in fact differ.

    Args:
        scores: (ensembles, members, responses) of ensembles trained independently of each other.

    Returns:
        The members' sample variance, averaged over ensembles (responses,), and the sample variance over
        ensembles of their mean reward (responses,).
    """
    if scores.ndim != 3 or min(scores.shape[:2]) < 2:
        raise ValueError(
            "scores: expected (at least two ensembles, at least two members, responses), got "
            f"{scores.shape}"
        )
    within = scores.var(1, ddof=1).mean(0)
    between = scores.mean(1).var(0, ddof=1)
    return np.asarray(within), np.asarray(between)


def _check_alike(**scores: Array) -> None:
    first, second = (np.shape(one) for one in scores.values())
    if first != second:
        raise ValueError(f"{', '.join(scores)}: expected one shape, got {first} and {second}")
