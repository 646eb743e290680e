"""What the check of the printed statistics found, in sentences made from its tables."""

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from vaalign_lib.papers import recomputed
from vaalign_lib.papers.printed import RANGES, printed_range, printed_value

LEVEL = 0.05
SMALL_MARGIN = 0.1  # of the gain: the margin that our own runs are judged by


def of_rows(count: int, total: int) -> str:
    """Return "all seven"-like words for a count of rows."""
    return f"all {total}" if count == total else f"{count} of {total}"


def _chosen(checked: pd.DataFrame, item: str, quantity: str) -> pd.DataFrame:
    return checked[(checked["item"] == item) & (checked["quantity"] == quantity)]


def _listed(rows: pd.DataFrame, digits: int) -> str:
    """Return the inconsistent ones of printed statistics beside what they should be."""
    return "; ".join(
        f"{line.row}: {line.printed:g}, recomputed {line.low:.{digits}f} to {line.high:.{digits}f}"
        for line in rows[~rows["consistent"]].itertuples()
    )


def _consistent(rows: pd.DataFrame, name: str, digits: int) -> str:
    text = f"{name} {of_rows(int(rows['consistent'].sum()), len(rows))} follow from what is printed"
    odd = _listed(rows, digits)
    return f"{text}; not so {odd}." if odd else f"{text}."


def variances_in_words(checked: pd.DataFrame, tests: pd.DataFrame) -> str:
    """Return what was found about Table 1.

    Args:
        checked: of `recomputed.audit`.
        tests: of `recomputed.variance_tests`.
    """
    ratios, critical = (_chosen(checked, "Table 1", name) for name in ("F", "critical F"))
    value, printed = critical["low"].iloc[0], critical["printed"].iloc[0]
    text = _consistent(ratios, "Of the printed F", 2)
    degrees = recomputed.POLICIES - 1
    if critical["consistent"].iloc[0]:
        text += f" The critical value is that of {degrees} and {degrees} degrees of freedom."
    else:
        side = "stricter" if printed > value else "laxer"
        needed = recomputed.equal_degrees(printed)
        text += (
            f" The 0.975 quantile of F for {degrees} and {degrees} degrees of freedom is "
            f"{value:.3f}; the printed {printed} belongs to {needed:.0f} and {needed:.0f}, and is "
            f"{side}."
        )
    seen = int((tests["p_holm"] < LEVEL).sum())
    return text + (
        f" For independent normal returns the printed variances differ significantly in "
        f"{of_rows(seen, len(tests))} rows, at the rounding least in favour of it and adjusted by Holm. "
        f"Normality cannot be checked; an excess kurtosis of {tests['kurtosis'].min():.1f} would "
        f"undo the weakest single row, one of {tests['kurtosis'].max():.0f} the strongest. How "
        "much of each variance is noise of the evaluation is not printed either. Where a variance "
        f"has one significant digit, two decimals of F are not determined: the ranges reach from "
        f"{ratios['low'].min():.1f} to {ratios['high'].max():.1f}."
    )


def means_in_words(checked: pd.DataFrame, tests: pd.DataFrame) -> str:
    """Return what was found about Table 2.

    Args:
        checked: of `recomputed.audit`.
        tests: of `recomputed.mean_tests`.
    """
    alike = int((tests["margin_in_gains"] < SMALL_MARGIN).sum())
    return (
        f"{_consistent(_chosen(checked, 'Table 2', '|t|'), 'Of the printed t', 2)} "
        f"{_consistent(_chosen(checked, 'Table 2', 'critical t'), 'Of the critical values', 3)} "
        "The means are called statistically identical because no test rejects their equality. An "
        "equivalence test at 5% could exclude, in every row and however the numbers were rounded, "
        f"differences above {tests['margin_in_sds'].max():.2f} standard deviations of vanilla's "
        "returns. Beside what vanilla gains over the reference (as risk, mean and variance imply "
        f"it) that is not little: the differences that cannot be excluded are "
        f"{tests['margin_in_gains'].min():.2f} to {tests['margin_in_gains'].max():.1f} times the "
        f"gain, and within a tenth of it the means are equivalent in {alike} of {len(tests)} rows."
    )


def risks_in_words(checked: pd.DataFrame, tests: pd.DataFrame) -> str:
    """Return what was found about Table 3.

    Args:
        checked: of `recomputed.audit`.
        tests: of `recomputed.risk_tests`.
    """
    rows, by_row = _chosen(checked, "Table 3", "p"), tests.set_index("row")
    text = _consistent(rows, "Of the printed p-values", 2)
    wrong = rows.loc[~rows["consistent"], "row"]
    if len(wrong):
        needed = ", ".join(str(by_row.loc[row, "needed_for_p"]) for row in wrong)
        text += f" Risks like these would give the printed p from {needed} policies of each method on."
    for pair in _same_risks():
        text += (
            f" {' and '.join(pair)} print the same two risks, with p "
            f"{' and '.join(str(printed_value(f'table3.{row}.p_value')) for row in pair)}."
        )
    names = ("p", "p_holm", "p_worst_holm", "boschloo_holm", "p_printed_holm")
    counts = {name: int((tests[name] < LEVEL).sum()) for name in names}
    return text + (
        f" By the recomputed p the printed risk is lower at 5% in "
        f"{of_rows(counts['p'], len(tests))} rows; adjusted by Holm in {counts['p_holm']}, at the "
        f"rounding least in favour of it in {counts['p_worst_holm']}, by Boschloo's exact test of "
        f"the nearest counts in {counts['boschloo_holm']}. The printed p-values themselves, "
        f"adjusted by Holm, leave {counts['p_printed_holm']}."
    )


def _same_risks() -> list[tuple[str, str]]:
    """Return pairs of rows that print the same risks and different p."""
    names = ("risk_vanilla", "risk_variance_aware")
    risks = {row: [printed_value(f"table3.{row}.{name}") for name in names] for row in recomputed.rows()}
    p = {row: printed_value(f"table3.{row}.p_value") for row in risks}
    pairs = combinations(risks, 2)
    return [(one, other) for one, other in pairs if risks[one] == risks[other] and p[one] != p[other]]


def counts_in_words(shares: pd.DataFrame) -> str:
    """Return whether the printed risks can be counts of 80.

    Args:
        shares: of `recomputed.risks_as_counts`.
    """
    rules = [name for name in recomputed.ROUNDINGS if (shares[name] != "none").all()]
    if rules:
        return f"All printed risks are counts out of {recomputed.POLICIES}, rounded {rules[0]}."
    needs = "; ".join(
        f"rounding {name} cannot give "
        + ", ".join(f"{risk:.2f}" for risk in shares.loc[shares[name] == "none", "risk"])
        for name in recomputed.ROUNDINGS
    )
    return (
        f"No one rule of rounding makes all printed risks of counts out of {recomputed.POLICIES}: {needs}. "
        "Whether a risk is of fewer runs, or was rounded in another way, cannot be determined."
    )


def references_in_words(implied: pd.DataFrame, fits: Sequence[bool]) -> str:
    """Return whether risks, means and variances fit each other.

    Args:
        implied: of `recomputed.implied_references`.
        fits: whether a row does.
    """
    gains = [implied[f"gain_{name}"] for name in ("vanilla", "variance_aware")]
    return (
        f"In {of_rows(sum(fits), len(implied))} rows both methods imply the same reference, within two "
        "standard errors and rounding. The gains over it that follow are "
        f"{gains[0].min():.2f} to {gains[0].max():.2f} (vanilla) and {gains[1].min():.2f} to "
        f"{gains[1].max():.2f} (variance-aware), in points of each row."
    )


def ranges_in_words(checked: pd.DataFrame, low: float, high: float) -> str:
    """Return what was found about Table 4.

    Args:
        checked: of `recomputed.audit`.
        low: end of the interval of `recomputed.range_trend`.
        high: its other end.
    """
    text = _consistent(_chosen(checked, "Table 4", "ratio"), "Of the printed ratios", 2)
    trend = "fall with the range, by more than the error of 80 normal returns each"
    if low <= 0 <= high:
        trend = "show no trend beyond the error of 80 normal returns each"
    elif high < 0:
        trend = "rise as the range narrows"
    widths = _chosen(checked, "Table 4", "variance of the SDs, rescaled")
    fit = int(widths["consistent"].sum())
    text += f" They {trend} (slope between {low:.2f} and {high:.2f})."
    if fit < len(widths):
        off = ", ".join(f"{value:.2f}" for value in widths["off_by"])
        text += (
            " The variances of the intervals' standard deviations are not those of one set of "
            f"intervals, rescaled: they are {off} times what the widest range gives. From how many "
            "responses they were computed is not printed, so whether relative widths differ cannot "
            "be determined."
        )
    return f"{text} {_rescaled_variances()}"


def _rescaled_variances() -> str:
    """Return how vanilla's printed variances compare with those of rescaled rewards."""
    first = printed_value(f"table4.range-{RANGES[0]}.variance_vanilla")
    times = {
        top: printed_value(f"table4.range-{top}.variance_vanilla") / (first * (top / RANGES[0]) ** 2)
        for top in RANGES[1:]
    }
    text = "Were rewards only rescaled, vanilla's variance would fall as R squared; it is " + ", ".join(
        f"{value:.1f} times that at R = {top}" for top, value in times.items()
    )
    widest = max(times, key=lambda top: times[top])
    if times[widest] > 5:
        text += (
            f". At R = {widest} both variances may have slipped by a factor of ten, which would "
            "leave the ratio as it is; that cannot be proved from what is printed"
        )
    return text + "."


def same_setting_in_words() -> str:
    """Return whether the first row of Table 4 is a row of Table 1: one policy, one judge, one range."""
    pairs = [
        (f"table1.qwen-gemini-2.0-flash.{name}", f"table4.range-{RANGES[0]}.{name}")
        for name in ("variance_vanilla", "variance_variance_aware")
    ]
    ranges = [(printed_range(one), printed_range(other)) for one, other in pairs]
    same = all(low[0] <= high[1] and high[0] <= low[1] for low, high in ranges)
    ratios = [
        printed_value(f"{place}.variance_ratio_f")
        for place in ("table1.qwen-gemini-2.0-flash", f"table4.range-{RANGES[0]}")
    ]
    verb = "agree" if same else "do not agree"
    return (
        f"Table 4's first row has the policy, judge and range of a row of Table 1: the variances {verb} "
        f"within rounding; the printed ratios are {ratios[0]:.2f} and {ratios[1]:g}."
    )


def learning_rate_in_words() -> str:
    """Return what Table 12's learning rate can move."""
    rate, updates = printed_value("table12.learning_rate"), recomputed.qwen_updates()
    moved, half = (recomputed.adam_bound(rate, updates), recomputed.half_spacing(recomputed.TYPICAL_WEIGHT))
    once = recomputed.adam_bound(rate, 1)
    bfloat = "does not move at all" if once < half else "can move"
    return (
        f"Adam moves no weight by more than {moved:.1e} in the {updates} updates of one pass at "
        f"the printed learning rate of {rate:g} (the number of steps is not printed). In bfloat16 "
        f"a weight of {recomputed.TYPICAL_WEIGHT}, the standard deviation that such models start from, "
        f"{bfloat} if it is rounded after each update; in float32 the whole way is "
        f"{moved / recomputed.TYPICAL_WEIGHT:.1e} of it. Either there were many more steps, or the "
        "learning rate is not as printed, or both methods' policies were nearly the reference, and "
        "then F far from 1 would need another explanation than training. Which it was cannot be "
        "determined."
    )


def prompts_in_words() -> str:
    """Return how often Tables 9 and 10 go through the chat prompts, and how their learning rates "
    "differ.
    """
    steps, batch = (printed_value(f"table9.{name}") for name in ("steps", "effective_batch_size"))
    prompts, epochs = printed_value("text.chat.pairs"), printed_value("table9.epochs")
    rates = [printed_value(f"table{number}.learning_rate") for number in (9, 10)]
    return (
        f"Table 9: {steps:.0f} steps of {batch:.0f} are {steps * batch:,.0f} prompts, "
        f"{steps * batch / prompts:.0f} passes through {prompts:.0f}; printed is {epochs:.0f} "
        f"epoch. The learning rates of Tables 9 and 10 differ by "
        f"{100 * (rates[1] / rates[0] - 1):.0f}% between the methods."
    )


def in_short(checked: pd.DataFrame, variances: pd.DataFrame, risks: pd.DataFrame) -> str:
    """Return the check in two sentences."""
    statistics = checked[checked["quantity"] != "variance of the SDs, rescaled"]
    wrong = int((~statistics["consistent"]).sum())
    changed = statistics[
        (statistics["item"] == "Table 3") & (statistics["printed"] < LEVEL) & (statistics["low"] > LEVEL)
    ]
    fewest, most = (
        end(int((risks[name] < LEVEL).sum()) for name in ("p_holm", "p_worst_holm", "boschloo_holm"))
        for end in (min, max)
    )
    established = f"{fewest}" if fewest == most else f"{fewest} to {most}, by test and rounding,"
    return (
        f"{wrong} of {len(statistics)} printed statistics do not follow from their printed inputs; "
        f"{len(changed)} of these change a conclusion, p-values of Table 3. The differences in "
        f"variance of Table 1 are significant in "
        f"{of_rows(int((variances['p_holm'] < LEVEL).sum()), len(variances))} rows for independent "
        f"normal returns, those in risk of Table 3 in {established} of {len(risks)}."
    )
