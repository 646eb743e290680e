"""What choosing among a reference policy's responses can gain: best-of-n and the exponential tilt.

Needs no training: rewards of N responses to each prompt stand for the reference policy there.
"""

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
    """Return how often the response of each rank is the best of n drawn without replacement (samples,).

    Rank 0 is the worst; the probability is C(rank, n - 1) / C(samples, n).
    """
    if not 1 <= n <= samples:
        raise ValueError(f"n: expected 1 to {samples}, got {n}")
    rank = np.arange(samples)
    possible = rank >= n - 1
    log = np.full(samples, -np.inf)
    log[possible] = _log_choose(rank[possible], n - 1) - _log_choose(np.array(samples), n)
    return np.exp(log)


def _log_choose(total: NDArray[np.int64], part: int) -> Array:
    return np.asarray(gammaln(total + 1) - gammaln(part + 1) - gammaln(total - part + 1))


def best_of_n_kl(n: int) -> float:
    """Return ln n - (n - 1) / n, the KL divergence of best-of-n from the policy it chooses from.

    It is exact for rewards without ties and an upper bound with them.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    return float(np.log(n) - (n - 1) / n)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> tuple[Array, Array]:
    """Return mean proxy and mean gold reward of the response that the proxy ranks best of n.

    Args:
        proxy: rewards that choose (prompts, samples).
        gold: rewards that count (prompts, samples).
        n: how many are drawn.

    Returns:
        Both (prompts,), without bias from the finite sample.
    """
    chooses, counts = _same_shape(proxy, gold)
    order = np.argsort(chooses, axis=1, kind="stable")
    weights = best_of_n_weights(chooses.shape[1], n)
    ranked = [np.take_along_axis(values, order, axis=1) for values in (chooses, counts)]
    return ranked[0] @ weights, ranked[1] @ weights


def tilt(proxy: ArrayLike, gold: ArrayLike, beta: float) -> tuple[Array, Array, Array]:
    """Return mean proxy, mean gold reward and KL of the policy proportional to exp(proxy / beta).

    Returns:
        Each (prompts,); the KL is to the uniform distribution over the samples, at most ln(samples).
    """
    chooses, counts = _same_shape(proxy, gold)
    reference = np.full(chooses.shape[1], 1 / chooses.shape[1])
    policy = softmax_policy(chooses, reference, np.full(len(chooses), beta))
    kl = (policy * np.log(np.maximum(policy / reference, 1e-300))).sum(1)
    return (policy * chooses).sum(1), (policy * counts).sum(1), kl


def gains(
    proxies: dict[str, Array],
    gold: Array,
    category: NDArray[np.str_],
    ns: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    betas: tuple[float, ...] = (4.0, 2.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.15),
) -> pd.DataFrame:
    """Tabulate what each proxy gains, by category, as it is trusted more and more.

    Args:
        proxies: rewards (prompts, samples) by name; each is measured from its prompt's mean, in
            standard deviations over all.
        gold: (prompts, samples).
        category: of the prompts.
        ns: for best-of-n, at most the number of samples.
        betas: for the tilt, in the unit of the standardized proxy.

    Returns:
        A row per proxy, category, method and setting: `kl`, `proxy_gain`, `gain` and `error`, the
        standard error of the gain over prompts. Gains are over the mean of the prompt's samples.
    """
    base = gold.mean(1)
    rows = []
    for name, proxy in proxies.items():
        standard = proxy - proxy.mean(1, keepdims=True)
        if not standard.std() > 1e-12 * np.abs(proxy).max():
            raise ValueError(f"{name}: its rewards of each prompt's responses are all the same")
        standard = standard / standard.std()
        results: dict[tuple[str, float], tuple[Array, Array, Array]] = {}
        for n in ns:
            results["best of n", n] = (*best_of_n(standard, gold, n), np.full(len(gold), best_of_n_kl(n)))
        for beta in betas:
            results["tilt", beta] = tilt(standard, gold, beta)
        for (method, setting), (proxy_mean, gold_mean, kl) in results.items():
            for one in dict.fromkeys(category):
                rows_of = category == one
                gain = (gold_mean - base)[rows_of]
                rows.append(
                    {
                        "proxy": name,
                        "category": str(one),
                        "method": method,
                        "setting": float(setting),
                        "kl": kl[rows_of].mean(),
                        "proxy_gain": proxy_mean[rows_of].mean(),
                        "gain": gain.mean(),
                        "error": gain.std(ddof=1) / np.sqrt(rows_of.sum()),
                    }
                )
    return pd.DataFrame(rows)
