"""The sliders: every form draws, moving one changes the pictures, headless draws the defaults."""

import dataclasses
import io
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tests.experiments.test_policy_analysis import results
from vaalign_lib.experiments.comparisons import Comparisons
from vaalign_lib.experiments.conditions import JUDGE_ROW, Condition, plan
from vaalign_lib.figures import sliders
from vaalign_lib.figures import sliders as explore
from vaalign_lib.jobs import HEADLESS
from vaalign_lib.rewards.calibration import coverage, error_by_deviation
from vaalign_lib.theory import simulations
from vaalign_lib.theory.bandit import FORMS, published_bandits

BANDITS = published_bandits()
PNG = b"\x89PNG"
HALF_A_SECOND = 5  # times a plain picture of two axes, which takes a tenth of a second of a core


def cost(redraw):
    """Time of a redraw in times of a plain picture, by turns; the least of three, so loading is not in it."""
    spent = {plain_picture: [], redraw: []}
    for _ in range(3):
        for call, times in spent.items():
            started = time.process_time()
            call()
            times.append(time.process_time() - started)
    return min(spent[redraw]) / min(spent[plain_picture])


def plain_picture():
    figure, axes = plt.subplots(1, 2)
    for one in axes:
        one.plot([0, 1])
    figure.savefig(io.BytesIO(), format="png")
    plt.close(figure)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_draws(form):
    images = sliders.bandit_images(BANDITS[form], draws=200, seed=0)
    assert len(images) == 2 and all(image.startswith(PNG) for image in images)


def test_drawing_is_a_function_of_the_bandit_and_the_seed():
    bandit = BANDITS["exact"]
    first = sliders.bandit_images(bandit, draws=200, seed=0)
    assert first == sliders.bandit_images(bandit, draws=200, seed=0)
    assert first != sliders.bandit_images(bandit, draws=200, seed=1)
    noisier = dataclasses.replace(bandit, deviations=(5.0, 0.7, 0.7))
    assert first[0] != sliders.bandit_images(noisier, draws=200, seed=0)[0]


def test_sliders_start_from_the_bandit_and_redraw(monkeypatch):
    monkeypatch.delenv(HEADLESS, raising=False)
    drawn = []
    monkeypatch.setattr(
        explore, "bandit_images", lambda bandit, draws, seed: drawn.append(bandit) or [PNG, PNG]
    )
    box = sliders.bandit_explorer(BANDITS["exact"], draws=100, seed=0)
    columns = box.children[0].children
    assert drawn == [BANDITS["exact"]]
    columns[0].children[0].value = 2.0  # the true reward of arm 1
    assert drawn[-1].true_rewards == (2.0, 1.5, 1.95)
    form, strength, aware = columns[2].children
    form.value = "simplex"
    assert drawn[-1].form == "simplex" and strength.description == "ε"
    assert aware.layout.display == "none"
    strength.value = 0.5
    assert drawn[-1].vanilla_strength == drawn[-1].variance_aware_strength == pytest.approx(0.5)


def test_headless_shows_the_defaults(monkeypatch):
    monkeypatch.setenv(HEADLESS, "1")
    shown = []
    monkeypatch.setattr(explore, "display", lambda *images: shown.extend(images))
    assert sliders.bandit_explorer(BANDITS["exact"], draws=100, seed=0) is None
    assert len(shown) == 2


@pytest.fixture(scope="module")
def policies():
    """Vanilla's training variance is 0.8, the other's 0.2."""
    return results(plan(["rows", "independent", "ranges"]), lambda run: 0.8, count=80)


AT_SAME_KL = {"row": "qwen2-judge-b", "regime": "matched_kl", "protocol": "independent"}


def test_policies_are_drawn_with_the_ratio_of_the_tables(policies):
    run = Condition(*JUDGE_ROW, "variance_aware", protocol="independent", regime="matched_kl")
    ratio = Comparisons(policies, resamples=sliders.RESAMPLES).ratio(run)
    axes = sliders.policy_figure(policies, **AT_SAME_KL).axes[0]
    assert str(ratio) in axes.get_title(loc="left")
    dots = [len(one.get_offsets()) for one in axes.collections if len(one.get_offsets()) > 1]
    assert dots == [80, 80]


@pytest.mark.parametrize("outcome", sliders.OUTCOMES)
def test_every_outcome_is_redrawn_within_half_a_second(policies, outcome):
    policies = policies.assign(length=policies["kl"] * 3 + 20)
    assert sliders.policy_image(policies, **AT_SAME_KL, outcome=outcome).startswith(PNG)
    assert cost(lambda: sliders.policy_image(policies, **AT_SAME_KL, outcome=outcome)) < HALF_A_SECOND


def test_policies_that_were_not_trained_are_named(policies):
    with pytest.raises(LookupError, match="gpt2-ensemble, shared, as_printed: no such policies"):
        sliders.policy_figure(policies, "gpt2-ensemble", "as_printed", "shared")
    missing = {"row": "gpt2-ensemble", "regime": "as_printed", "protocol": "shared"}
    assert sliders.policy_image(policies, **missing).startswith(PNG)


def test_the_policy_explorer_redraws_and_renders_headless(policies, monkeypatch):
    drawn, shown = [], []
    monkeypatch.setattr(sliders, "policy_image", lambda policies, **chosen: drawn.append(chosen) or PNG)
    monkeypatch.setattr(sliders, "display", lambda *images: shown.extend(images))
    monkeypatch.setenv(HEADLESS, "1")
    assert sliders.policy_explorer(policies) is None and len(shown) == 1
    monkeypatch.delenv(HEADLESS)
    row, regime, *_, outcome = sliders.policy_explorer(policies).children[0].children
    assert drawn[0] == drawn[1] and drawn[0]["row"] == "gpt2-ensemble"
    row.value, regime.value, outcome.value = "qwen2-judge-b", "as_printed", "kl"
    assert drawn[-1] == {
        "row": "qwen2-judge-b",
        "regime": "as_printed",
        "protocol": "shared",
        "outcome": "kl",
    }


# --- theorems -----------------------------------------------------------------------------------------


def test_theorem_table_follows_the_theorems():
    table = sliders.theorem_table(beta=1.0, epsilon=0.01, noise=1.0, ratio=36.0, draws=4000)
    assert table[["arm 1", "arm 2", "arm 3"]].sum(axis=1).to_numpy() == pytest.approx(1)
    risk = table.set_index("policy")["risk"]
    assert risk["Eq. (3), variance-aware"] < risk["Eq. (2), vanilla"]  # Theorem 2.4, in the interior
    equal = sliders.theorem_table(beta=1.0, epsilon=0.01, noise=1.0, ratio=1.0).set_index("policy")["gain"]
    assert equal["Eq. (3), variance-aware"] == pytest.approx(equal["Eq. (2), vanilla"])
    same = ["vanilla", "PPO fixed point", "true optimum", "as printed"]
    assert equal[same].to_numpy() == pytest.approx(equal["vanilla"])


def test_theorem_sliders_redraw_once_from_few_draws(monkeypatch):
    """What a redraw costs is bounded by its draws: one set of estimates of at most 500."""
    monkeypatch.delenv(HEADLESS, raising=False)
    asked = []

    def counted(truth, variances, draws, rng):
        asked.append(draws)
        return simulations.draw_estimates(truth, variances, draws, rng)

    monkeypatch.setattr(sliders, "draw_estimates", counted)
    box = sliders.theorem_explorer(seed=1)
    columns, picture = box.children
    first = bytes(picture.value)
    assert first.startswith(PNG) and len(asked) == 1
    for column in columns.children:
        for slider in column.children:
            before = bytes(picture.value)
            slider.value = slider.value / 10
            assert bytes(picture.value) != before
    assert len(asked) == 5 and max(asked) <= 500


def test_theorem_explorer_headless_shows_the_defaults(monkeypatch):
    monkeypatch.setenv(HEADLESS, "1")
    shown = []
    monkeypatch.setattr(explore, "display", lambda *images: shown.extend(images))
    assert sliders.theorem_explorer(seed=3) is None
    assert [one.data for one in shown] == sliders.theorem_images(seed=3, **sliders.THEOREM_DEFAULTS)


def measured(kind, members):
    """Return variances, errors by deviation and coverage of normal errors that are as large as said."""
    random = np.random.default_rng(members)
    variances = random.lognormal(size=300)
    errors = random.normal(size=300) * np.sqrt(variances)
    tables = [
        pd.concat([measure(errors, variances).assign(repaired=one) for one in (False, True)])
        for measure in (error_by_deviation, coverage)
    ]
    return variances, *tables


def test_members_and_kind_redraw_an_ensemble_in_half_a_second(monkeypatch):
    monkeypatch.delenv(HEADLESS, raising=False)
    box = sliders.ensemble_explorer(measured, ["bootstrap", "order"], 10)
    (kind,), (members,) = (column.children for column in box.children[0].children)
    picture = box.children[1]
    before, values = bytes(picture.value), iter((4, 5, 6))
    assert cost(lambda: setattr(members, "value", next(values))) < HALF_A_SECOND
    assert before.startswith(PNG) and picture.value != before
    before, kind.value = bytes(picture.value), "order"
    assert picture.value != before


def test_headless_draws_all_members_of_the_first_kind(monkeypatch):
    monkeypatch.setenv(HEADLESS, "1")
    shown, asked = [], []
    monkeypatch.setattr(explore, "display", shown.append)
    measure = lambda kind, members: asked.append((kind, members)) or measured(kind, members)  # noqa: E731
    assert sliders.ensemble_explorer(measure, ["bootstrap", "order"], 10) is None
    assert len(shown) == 1 and asked == [("bootstrap", 10)]
