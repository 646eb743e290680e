"""Sliders for the notebooks. Run headless, each draws its defaults."""

from io import BytesIO

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure

from vaalign_lib.figures import policies as policy_figures
from vaalign_lib.figures import theory
from vaalign_lib.jobs import headless
from vaalign_lib.papers.printed import printed_value
from vaalign_lib.statistics.returns import Returns, training_variance_ratio
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


# --- policies -------------------------------------------------------------------------------------------

OUTCOMES = ("true_reward", "gold", "kl", "length")
RESAMPLES = 2000


def policy_figure(
    policies: pd.DataFrame, row: str, regime: str, protocol: str, outcome: str = "true_reward", seed: int = 0
) -> Figure:
    """Draw one outcome of both methods' policies, with the ratio of its training variances.

    Args:
        policies: of `results.Results`, a row per policy.
        row: of Tables 1 to 3, `gpt2-ensemble`.
        regime: of the penalty.
        protocol: `shared` or `independent`.
        outcome: one of `OUTCOMES`; those without standard errors have no noise taken out.
        seed: of the bootstrap over policies.

    Raises:
        LookupError: there are no such policies of both methods.
    """
    stacks = _stacks(policies, row, regime, protocol)
    if any(one.empty for one in stacks.values()):
        raise LookupError(f"{row}, {protocol}, {regime}: no such policies of both methods among the results")
    measured = {name: _measured(one, outcome) for name, one in stacks.items()}
    vanilla, aware = (
        Returns(measured[name]["true_reward"].to_numpy(), measured[name]["true_reward_error"].to_numpy())
        for name in ("vanilla", "variance_aware")
    )
    size = vanilla.values.size
    drawn = np.random.default_rng([seed, 0]).integers(size, size=(RESAMPLES, size))
    ratio = training_variance_ratio([vanilla], [aware], [drawn])
    title = f"{row}, {protocol} source, {_words(regime)}, {size} policies each\nvariance ratio {ratio}"
    return policy_figures.return_distributions({title: measured}, policy_figures.LABELS[outcome])


def _stacks(policies: pd.DataFrame, row: str, regime: str, protocol: str) -> dict[str, pd.DataFrame]:
    """Return the policies of a comparison by method; to match a KL only the variance-aware one changes."""
    plain = policies.query(
        "repeat == 0 and highest == 100 and widths == 'rescaled' and disagreement == 'none'"
    )
    mine = plain[plain["architecture"] + "-" + plain["source"] == row]
    before = "equal_mean_penalty" if regime == "matched_kl" else regime
    kinds = [
        ("vanilla", before, protocol),
        ("variance_aware", regime, protocol),
        ("reference", before, "shared"),
    ]
    return {
        method: mine.query("objective == @method and regime == @penalty and protocol == @kind").sort_values(
            "policy"
        )
        for method, penalty, kind in kinds
    }


def _measured(stack: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """Put an outcome where figures look for returns."""
    return stack.assign(true_reward=stack[outcome], true_reward_error=stack.get(f"{outcome}_error", 0.0))


def _words(name: str) -> str:
    return name.replace("_", " ").replace("kl", "KL")


def policy_image(policies: pd.DataFrame, **chosen: str) -> bytes:
    """Return `policy_figure` as PNG; where there are no such policies it says so."""
    try:
        figure = policy_figure(policies, **chosen)
    except LookupError as error:
        figure = Figure(figsize=(3.9, 1))
        figure.text(0.5, 0.5, str(error.args[0]), ha="center", fontsize=8, wrap=True)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def policy_explorer(policies: pd.DataFrame) -> widgets.Widget | None:
    """Show a choice of row, penalty regime, protocol and outcome, and draw the policies of both methods.

    Args:
        policies: of `results.Results`, a row per policy.

    Returns:
        The widget to display; None when run headless, after drawing the first comparison.
    """
    aware = policies[policies["objective"] == "variance_aware"]
    options = {
        "row": list(dict.fromkeys(aware["architecture"] + "-" + aware["source"])),
        "regime": list(dict.fromkeys(aware["regime"])),
        "protocol": list(dict.fromkeys(aware["protocol"])),
        "outcome": list(OUTCOMES),
    }
    first = {name: values[0] for name, values in options.items()}
    if headless():
        display(Image(policy_image(policies, **first)))
        return None
    choices = {
        name: widgets.Dropdown(options=[(_words(one), one) for one in values], description=name)
        for name, values in options.items()
    }
    picture = widgets.Image(value=policy_image(policies, **first))

    def redraw(*_: object) -> None:
        picture.value = policy_image(policies, **{name: one.value for name, one in choices.items()})

    for one in choices.values():
        one.observe(redraw, names="value")
    return widgets.VBox([widgets.HBox(list(choices.values())), picture])
