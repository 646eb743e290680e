"""What choosing among a reference policy's responses gains, without training: best-of-n and exponential tilt.

Rewards of N responses to each prompt, (prompts, samples), stand for it; a proxy chooses, gold counts.
"""

from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from vaalign_lib.theory.tabular import softmax_policy

Array = NDArray[np.float64]


def _same_shape(proxy: ArrayLike, gold: ArrayLike) -> tuple[Array, Array]:
    """Return finite rewards of the same responses (prompts, samples) each."""
    chooses, counts = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float)
    if chooses.ndim != 2 or chooses.shape != counts.shape:
        raise ValueError(f"gold: expected proxy's (prompts, samples), {chooses.shape}, got {counts.shape}")
    for name, one in (("proxy", chooses), ("gold", counts)):
        if not np.isfinite(one).all():
            raise ValueError(f"{name}: expected finite rewards, {(~np.isfinite(one)).sum()} are not")
    return chooses, counts


def best_of_n_weights(samples: int, n: int) -> Array:
    """Return how often the response of each rank, worst first, is the best of n drawn without replacement
    (samples,): C(rank, n - 1) / C(samples, n).
    """
    if not 1 <= n <= samples:
        raise ValueError(f"n: expected 1 to {samples}, got {n}")
    return np.exp(_log_choose(np.arange(samples), n - 1) - _log_choose(np.array(samples), n))


def _log_choose(total: NDArray[np.int64], part: int) -> Array:
    """Return ln C(total, part), -inf where there are fewer than `part`."""
    return np.asarray(gammaln(total + 1) - gammaln(part + 1) - gammaln(total - part + 1))


def best_of_n_kl(n: int) -> float:
    """Return ln n - (n - 1) / n, the KL divergence of best-of-n from the policy it chooses from: exact for
    rewards without ties, an upper bound with them.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    return float(np.log(n) - (n - 1) / n)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> tuple[Array, Array]:
    """Return mean proxy and mean gold reward of what the proxy ranks best of n, (prompts,) each, without bias
    from the finite sample.
    """
    chooses, counts = _same_shape(proxy, gold)
    order = np.argsort(chooses, axis=1, kind="stable")  # (prompts, samples)
    weights = best_of_n_weights(chooses.shape[1], n)  # (samples,)
    chosen, counted = (np.take_along_axis(values, order, axis=1) @ weights for values in (chooses, counts))
    return chosen, counted


def tilt(proxy: ArrayLike, gold: ArrayLike, beta: float) -> tuple[Array, Array, Array]:
    """Return mean proxy, mean gold reward and KL of the policy proportional to exp(proxy / beta), (prompts,)
    each; the KL is to the uniform distribution over the samples, at most ln(samples).
    """
    chooses, counts = _same_shape(proxy, gold)
    reference = np.full(chooses.shape[1], 1 / chooses.shape[1])  # (samples,)
    policy = softmax_policy(chooses, reference, np.full(len(chooses), beta))  # (prompts, samples)
    kl = (policy * np.log(np.maximum(policy / reference, 1e-300))).sum(1)  # (prompts,)
    return (policy * chooses).sum(1), (policy * counts).sum(1), kl


def gains(
    proxies: dict[str, Array],
    gold: Array,
    category: NDArray[np.str_],
    ns: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    betas: tuple[float, ...] = (4.0, 2.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.15),
) -> pd.DataFrame:
    """Tabulate what each proxy gains, by category, as it is trusted more and more.

    A proxy is measured from its prompt's mean, in standard deviations over all; so is beta. A row per proxy,
    category, method and setting: `kl`, `proxy_gain`, `gain` over the mean of the prompt's samples, and its
    standard error over prompts, `error`.
    """
    base, rows = gold.mean(1), []  # (prompts,)
    for name, proxy in proxies.items():
        standard = proxy - proxy.mean(1, keepdims=True)  # (prompts, samples)
        if not standard.std() > 1e-12 * np.abs(proxy).max():
            raise ValueError(f"{name}: its rewards of each prompt's responses are all the same")
        standard = standard / standard.std()
        results = {
            ("best of n", float(n)): (*best_of_n(standard, gold, n), np.full(len(gold), best_of_n_kl(n)))
            for n in ns
        } | {("tilt", beta): tilt(standard, gold, beta) for beta in betas}
        for (how, (chosen, reached, kl)), one in product(results.items(), dict.fromkeys(category)):
            here = category == one  # (prompts,)
            gain = (reached - base)[here]
            means = kl[here].mean(), chosen[here].mean(), gain.mean()
            rows.append((name, str(one), *how, *means, gain.std(ddof=1) / np.sqrt(here.sum())))
    names = ["proxy", "category", "method", "setting", "kl", "proxy_gain", "gain", "error"]
    return pd.DataFrame(rows, columns=names)
