"""The half page that the report and the README open with."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, field_validator

from vaalign_lib.paths import DATA, ROOT
from vaalign_lib.published import rule_of
from vaalign_lib.runs import write_atomically

VERDICTS = {  # heading by verdict, in their order
    "measured here instead": "Measured here",
    "reproduced": "Reproduced",
    "reproduced in kind": "Reproduced in kind",
    "corrected": "Corrected",
    "contradicted": "Contradicted",
    "not determinable": "Not determinable",
}
README = ROOT / "README.md"
BEGIN, END = "<!-- summary, written by vaalign reproduce -->", "<!-- end of the summary -->"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(_Strict):
    """A finding that the summary holds.

    Attributes:
        rule: its id.
        text: what it is about.
        found: how it is written; see data/summary.yaml.
        logarithm: whether the estimate is a logarithm.
    """

    rule: str
    text: str
    found: str = "{text}"
    logarithm: bool = False

    @field_validator("rule")
    @classmethod
    def _known(cls, name: str) -> str:
        return rule_of(name).id


class Summary(_Strict):
    """What the summary consists of."""

    stand_ins: str
    figures: list[str]
    lines: list[Line]


def settings() -> Summary:
    """Return what the summary consists of, from data/summary.yaml."""
    content = yaml.safe_load((DATA / "summary.yaml").read_text(encoding="utf-8"))
    return Summary.model_validate(content)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Return the lines of the summary by the heading of their verdict.

    Args:
        rows: of `report.scoreboard`. What has not been found yet is left out.

    Returns:
        For each heading lines with `text`, `found`, `command` and `item`.
    """
    by_id = {row["id"]: row for row in rows}
    found: dict[str, list[dict[str, str]]] = {heading: [] for heading in VERDICTS.values()}
    for line in settings().lines:
        row = by_id[line.rule]
        if row["verdict"] in VERDICTS:
            found[VERDICTS[row["verdict"]]].append(
                {
                    "text": line.text.format(printed=row["published"]),
                    "found": _written(line, row),
                    "command": f"vaalign reproduce --only {row['notebook'].split('_')[0]}",
                    "item": row["item"],
                }
            )
    return {heading: lines for heading, lines in found.items() if lines}


def _written(line: Line, row: Mapping[str, Any]) -> str:
    numbers = {name: row[name] for name in ("value", "low", "high")}
    if line.logarithm:
        numbers = {name: math.exp(number) for name, number in numbers.items()}
    return line.found.format(text=row["reproduced"], **numbers)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the summary as a Markdown table, with the command that makes each number."""
    lines = ["| | what | found here | command |", "|---|---|---|---|"]
    for heading, found in summary(rows).items():
        for k, one in enumerate(found):
            name = f"**{heading}**" if k == 0 else ""
            text, found_here = (one[part].replace("|", "\\|") for part in ("text", "found"))
            lines.append(f"| {name} | {text} | {found_here} | `{one['command']}` |")
    return settings().stand_ins + "\n\n" + "\n".join(lines) + "\n"


def write_into_readme(rows: Sequence[Mapping[str, Any]], readme: Path = README) -> bool:
    """Put the summary between its two marks in the README; return whether that changed it."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected the lines {BEGIN!r} and {END!r} once each")
    block = f"{BEGIN}\n{markdown(rows)}{END}"
    changed = re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL
    )
    if changed != text:
        write_atomically(readme, changed)
    return changed != text
