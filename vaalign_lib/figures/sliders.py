"""Sliders for the notebooks. Run headless, each draws its defaults."""

from io import BytesIO

import ipywidgets as widgets
import numpy as np
from IPython.display import Image, display

from vaalign_lib.figures import theory
from vaalign_lib.jobs import headless
from vaalign_lib.papers.printed import printed_value
from vaalign_lib.theory.bandit import FORMS, QUADRATIC, Bandit


def bandit_images(bandit: Bandit, draws: int, seed: int) -> list[bytes]:
    """Draw Figures 2 and 3 of one bandit from a seed; return both as PNG."""
    estimates = bandit.draw(np.random.default_rng(seed), draws)
    risks = (
        printed_value("figure3.vanilla.underperformance"),
        printed_value("figure3.variance_aware.underperformance"),
    )
    returns = bandit.returns(estimates)
    images = []
    for figure in (
        theory.bandit_arms(bandit, estimates),
        theory.bandit_returns(bandit, {f"{draws:,} draws": returns}, risks, width=8.4),
    ):
        figure.set_layout_engine(None)  # fixed margins take half the time of measured ones
        figure.subplots_adjust(left=0.09, right=0.98, bottom=0.33, top=0.91, wspace=0.25)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=90)
        images.append(buffer.getvalue())
    return images


def bandit_explorer(bandit: Bandit, draws: int, seed: int) -> widgets.Widget | None:
    """Show sliders for the three true rewards, the deviations, the form and its strength.

    Args:
        bandit: the values that the sliders start from.
        draws: of the estimates, at every redraw.
        seed: of the draws, the same at every redraw.

    Returns:
        The widget to display; None when run headless, after drawing the defaults.
    """
    if headless():
        display(*(Image(image) for image in bandit_images(bandit, draws, seed)))
        return None
    sliders = _sliders(bandit)
    pictures = [widgets.Image(value=image) for image in bandit_images(bandit, draws, seed)]

    def redraw(*_: object) -> None:
        images = bandit_images(_bandit_of(sliders), draws, seed)
        for picture, image in zip(pictures, images, strict=True):
            picture.value = image

    def relabel(*_: object) -> None:
        quadratic = sliders["form"].value in QUADRATIC
        sliders["vanilla"].description = "ε" if quadratic else "β, vanilla"
        sliders["aware"].layout.display = "none" if quadratic else ""

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    sliders["form"].observe(relabel, names="value")
    relabel()
    rewards = widgets.VBox([sliders[f"reward {k}"] for k in (1, 2, 3)])
    deviations = widgets.VBox([sliders[f"deviation {k}"] for k in (1, 2, 3)])
    strengths = widgets.VBox([sliders["form"], sliders["vanilla"], sliders["aware"]])
    return widgets.VBox([widgets.HBox([rewards, deviations, strengths]), *pictures])


def _sliders(bandit: Bandit) -> dict[str, widgets.ValueWidget]:
    settings = {"continuous_update": False}
    sliders: dict[str, widgets.ValueWidget] = {}
    for k, (reward, deviation) in enumerate(zip(bandit.true_rewards, bandit.deviations, strict=True), 1):
        sliders[f"reward {k}"] = widgets.FloatSlider(
            reward, min=-3, max=5, step=0.05, description=f"r*, arm {k}", **settings
        )
        sliders[f"deviation {k}"] = widgets.FloatSlider(
            deviation, min=0.05, max=30, step=0.05, description=f"σ, arm {k}", **settings
        )
    sliders["form"] = widgets.Dropdown(
        options=[(text, form) for form, text in FORMS.items()],
        value=bandit.form,
        description="form",
        layout=widgets.Layout(width="26em"),
    )
    for name, strength in (("vanilla", bandit.vanilla_strength), ("aware", bandit.variance_aware_strength)):
        sliders[name] = widgets.FloatLogSlider(
            strength, min=-2, max=1.5, step=0.05, description="β, aware", readout_format=".2f", **settings
        )
    return sliders


def _bandit_of(sliders: dict[str, widgets.ValueWidget]) -> Bandit:
    form = sliders["form"].value
    vanilla = sliders["vanilla"].value
    return Bandit(
        true_rewards=tuple(sliders[f"reward {k}"].value for k in (1, 2, 3)),
        deviations=tuple(sliders[f"deviation {k}"].value for k in (1, 2, 3)),
        form=form,
        vanilla_strength=vanilla,
        variance_aware_strength=vanilla if form in QUADRATIC else sliders["aware"].value,
    )
