"""The sliders: every form draws, moving one changes the pictures, headless draws the defaults."""

import dataclasses

import pytest

from vaalign_lib.figures import sliders
from vaalign_lib.figures import sliders as explore
from vaalign_lib.jobs import HEADLESS
from vaalign_lib.theory.bandit import FORMS, published_bandits

BANDITS = published_bandits()
PNG = b"\x89PNG"


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
