"""Pilot grids and matched KL, on curves that are known."""

import numpy as np
import pandas as pd
import pytest

from vaalign_lib.training.matched_kl import Grid, MatchError, beta_for_kl, final, match_kl


def curve(beta):
    return 2.0 * beta**-0.7


def test_the_beta_of_a_known_curve_is_found_between_the_cells():
    betas = [0.4, 0.05, 0.1, 0.2]
    for target in (4.0, 5.0, 9.0, 16.0):
        found = beta_for_kl(betas, [curve(b) for b in betas], target)
        assert curve(found) == pytest.approx(target, rel=1e-3)


def test_noise_that_says_more_penalty_gives_more_kl_is_averaged_out():
    found = beta_for_kl([0.1, 0.2, 0.3, 0.4], [4.0, 2.9, 3.1, 2.0], 3.0)
    assert 0.2 <= found <= 0.3
    assert beta_for_kl([0.1, 0.2], [3.0, 3.0], 3.0) == pytest.approx(0.02**0.5)


@pytest.mark.parametrize("target", [0.1, 100.0])
def test_a_target_outside_of_the_grid_is_refused(target):
    with pytest.raises(MatchError, match="widen the grid"):
        beta_for_kl([0.1, 0.2], [4.0, 2.0], target)


def test_matching_corrects_a_biased_pilot_and_checks_itself():
    betas = [0.05, 0.1, 0.2, 0.4]
    pilot = [1.3 * curve(b) * f for b, f in zip(betas, (1.0, 1.05, 0.97, 1.0), strict=True)]
    beta, tried = match_kl(curve, betas, pilot, 5.0)
    assert curve(beta) == pytest.approx(5.0, rel=0.03)
    assert len(tried) > 1 and abs(tried["off"].iloc[0]) > 0.03 >= abs(tried["off"].iloc[-1])


def test_matching_gives_up_after_its_attempts_and_says_what_it_saw():
    random = np.random.default_rng(0)
    with pytest.raises(MatchError, match=r"in 3 attempts: .* gave"):
        match_kl(lambda b: 5.0 * float(random.choice([0.8, 1.25])), [0.05, 0.1, 0.2, 0.4],
                 [9.0, 6.0, 4.0, 2.0], 5.0, attempts=3)  # fmt: skip


def test_a_grid_lays_out_its_cells_and_averages_them():
    grid = Grid([1e-4, 2e-4], [0.1, 0.2, 0.4], repeats=2)
    assert len(grid.cells) == 12
    assert grid.cells["learning_rate"].is_monotonic_increasing  # equal rates share the optimizer's call
    method = grid.method("variance_aware", standardized=False)
    assert method.beta[:4] == [0.1, 0.1, 0.2, 0.2] and not method.standardized
    steps = pd.MultiIndex.from_product([range(1, 31), range(12)], names=["step", "policy"])
    log = steps.to_frame(index=False)
    log["kl"] = log["policy"] + (log["step"] <= 20) * 1000.0  # only the last ten count
    log["gold"] = 1.0
    table = grid.summary(log)
    np.testing.assert_allclose(table["kl"], [0.5, 2.5, 4.5, 6.5, 8.5, 10.5])
    np.testing.assert_allclose(table["kl_error"], 0.5)
    assert table["beta"].tolist() == [0.1, 0.2, 0.4] * 2
    assert final(log)["kl"].tolist() == list(range(12))


def test_a_pilot_that_is_far_off_does_not_mislead_for_long():
    """What whole stacks gave counts for more than the pilot: with it alone on both sides of the target."""
    betas = np.array([0.06, 0.11, 0.2, 0.36, 0.66])

    def kl(
        beta,
    ):  # as a run of the study had it: its pilot found 2.06 nats at a third of the right coefficient
        return 2.2 * (0.2992 / beta) ** 0.45

    pilot = 2.06 * (0.1221 / betas) ** 0.9
    beta, tried = match_kl(kl, betas.tolist(), pilot.tolist(), 2.06)
    assert tried["beta"].iloc[0] == pytest.approx(0.1221, rel=0.02)
    assert len(tried) <= 4
    assert kl(beta) == pytest.approx(2.06, rel=0.03)
