"""Sliders for the notebooks. Run headless, each draws its defaults."""

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from vaalign_lib import figures
from vaalign_lib.bandit import FORMS, QUADRATIC, Bandit
from vaalign_lib.progress import headless
from vaalign_lib.published import printed_value


def draw_bandit(bandit: Bandit, draws: int, seed: int) -> None:
    """Draw Figures 2 and 3 of one bandit from a seed."""
    estimates = bandit.draw(np.random.default_rng(seed), draws)
    risks = (
        printed_value("figure3.vanilla.underperformance"),
        printed_value("figure3.variance_aware.underperformance"),
    )
    samples = {f"{draws:,} draws": bandit.returns(estimates)}
    for figure in (
        figures.bandit_arms(bandit, estimates),
        figures.bandit_returns(bandit, samples, risks),
    ):
        display(figure)
        plt.close(figure)


def bandit_explorer(bandit: Bandit, draws: int, seed: int) -> widgets.Widget | None:
    """Show sliders for the three true rewards, the deviations, the form and its strength.

    Args:
        bandit: the values that the sliders start from.
        draws: of the estimates, at every redraw.
        seed: of the draws, the same at every redraw.

    Returns:
        The widget to display; None when run headless.
    """
    if headless():
        draw_bandit(bandit, draws, seed)
        return None
    sliders = _sliders(bandit)
    output = widgets.Output()

    def redraw(*_: object) -> None:
        with output:
            output.clear_output(wait=True)
            draw_bandit(_bandit_of(sliders), draws, seed)

    def relabel(*_: object) -> None:
        quadratic = sliders["form"].value in QUADRATIC
        sliders["vanilla"].description = "ε" if quadratic else "β, vanilla"
        sliders["aware"].layout.display = "none" if quadratic else ""

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    sliders["form"].observe(relabel, names="value")
    relabel()
    redraw()
    rewards = widgets.VBox([sliders[f"reward {k}"] for k in (1, 2, 3)])
    deviations = widgets.VBox([sliders[f"deviation {k}"] for k in (1, 2, 3)])
    strengths = widgets.VBox([sliders["form"], sliders["vanilla"], sliders["aware"]])
    return widgets.VBox([widgets.HBox([rewards, deviations, strengths]), output])


def _sliders(bandit: Bandit) -> dict[str, widgets.ValueWidget]:
    settings = {"continuous_update": False}
    sliders: dict[str, widgets.ValueWidget] = {}
    for k, (reward, deviation) in enumerate(
        zip(bandit.true_rewards, bandit.deviations, strict=True), 1
    ):
        sliders[f"reward {k}"] = widgets.FloatSlider(
            reward, min=-3, max=5, step=0.05, description=f"r*, arm {k}", **settings
        )
        sliders[f"deviation {k}"] = widgets.FloatSlider(
            deviation,
            min=0.05,
            max=10,
            step=0.05,
            description=f"σ, arm {k}",
            **settings,
        )
    sliders["form"] = widgets.Dropdown(
        options=[(text, form) for form, text in FORMS.items()],
        value=bandit.form,
        description="form",
        layout=widgets.Layout(width="26em"),
    )
    for name, strength in (
        ("vanilla", bandit.vanilla_strength),
        ("aware", bandit.variance_aware_strength),
    ):
        sliders[name] = widgets.FloatLogSlider(
            strength,
            min=-2,
            max=1.5,
            step=0.05,
            description="β, aware",
            readout_format=".2f",
            **settings,
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
