"""Time the batched simplex solver against a general convex solver, one problem at a time.

    python benchmarks/trust_region.py

Both solve Equation (3) over distributions for the same random problems, in alternating rounds of one
run; printed are the ratio per problem and the largest difference of the attained values.
"""

import time

import cvxpy
import numpy as np

from vaalign_lib.theory.tabular import trust_region_policy

ARMS, BATCH, SINGLE, ROUNDS = 10, 10_000, 40, 5


def main() -> None:
    rng = np.random.default_rng(0)
    policy, rewards = cvxpy.Variable(ARMS, nonneg=True), cvxpy.Parameter(ARMS)
    variances, reference = rng.lognormal(size=ARMS), np.full(ARMS, 1 / ARMS)
    step = cvxpy.norm(cvxpy.multiply(np.sqrt(variances), policy - reference))
    problem = cvxpy.Problem(cvxpy.Maximize(rewards @ policy), [cvxpy.sum(policy) == 1, step <= np.sqrt(0.2)])
    ratios, gap = [], 0.0
    for _ in range(ROUNDS):
        estimates = rng.normal(size=(BATCH, ARMS))
        started = time.perf_counter()
        ours = trust_region_policy(estimates, reference, 0.2, variances=variances)
        batched = (time.perf_counter() - started) / BATCH
        started = time.perf_counter()
        for k in range(SINGLE):
            rewards.value = estimates[k]
            problem.solve(solver="CLARABEL")
            gap = max(gap, abs(problem.value - ours[k] @ estimates[k]))
        ratios.append((time.perf_counter() - started) / SINGLE / batched)
    print(f"{ARMS} arms, {BATCH} problems at once against cvxpy's CLARABEL one by one:")
    rounds = ", ".join(f"{ratio:.0f}" for ratio in ratios)
    print(f"  {np.median(ratios):.0f} times as fast per problem (rounds: {rounds})")
    print(f"  largest difference of the attained values: {gap:.1e}")


if __name__ == "__main__":
    main()
