"""The report: a scoreboard, a summary, and every figure and table of a run folder."""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from pydantic import BaseModel, ConfigDict, field_validator

from vaalign_lib.papers.printed import (
    FURTHER_ITEMS,
    ITEMS,
    Finding,
    Rule,
    printed_text,
    published,
    rule_of,
    rules,
    verdict,
)
from vaalign_lib.profiles import Profile
from vaalign_lib.reproduce.execute import FINDINGS, PAGE
from vaalign_lib.reproduce.run import is_done, notebooks, read_record
from vaalign_lib.store import DATA, RESULTS, ROOT, write_atomically

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
    changed = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)
    if changed != text:
        write_atomically(readme, changed)
    return changed != text


TEMPLATE = "report.html.jinja"


def write_report(profile: Profile, run_dir: Path, seed: int = 0) -> Path:
    """Write report.html and scoreboard.json from a run folder's finished notebooks.

    A notebook counts if it ran with the cells, library, inputs and seed of now; outdated ones are named.

    Returns:
        The path of the page, which opens offline.
    """
    finished = [book for book in notebooks() if read_record(run_dir / book.name) is not None]
    current = [book for book in finished if is_done(book, profile, seed, run_dir)]
    records = [_read(run_dir / book.name) for book in current]
    rows = scoreboard(records)
    write_atomically(run_dir / "scoreboard.json", json.dumps(rows, indent=1) + "\n")
    environment = Environment(
        loader=PackageLoader("vaalign_lib.reproduce"), autoescape=select_autoescape(["html", "jinja"])
    )
    page = environment.get_template(TEMPLATE).render(
        profile=profile,
        summary=summary(rows),
        stand_ins=settings().stand_ins,
        headline=[one for name in settings().figures for one in _named(name, records, run_dir)],
        items=[_item(name, rows, records, run_dir) for name in ITEMS + FURTHER_ITEMS],
        counts=Counter(row["verdict"] for row in rows),
        notebooks=[record["notebook"] for record in records],
        taken=[record["notebook"] for record in records if record.get("taken")],
        outdated=[book.name for book in finished if book not in current],
        claims=len(rows),
    )
    write_atomically(run_dir / "report.html", page)
    return run_dir / "report.html"


def _read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
    return record


def published_rows() -> list[dict[str, Any]]:
    """Return the scoreboard of the findings that are committed."""
    paths = sorted((RESULTS / "findings").glob("*.json"))
    return scoreboard([json.loads(path.read_text(encoding="utf-8")) for path in paths])


def scoreboard(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for every rule: published value, finding with its interval, verdict, rule, notebook.

    Raises:
        UnknownRuleError: a finding has no rule.
    """
    findings: dict[str, Finding] = {}
    for record in records:
        for entry in record["findings"]:
            finding = Finding.model_validate(entry)
            findings[rule_of(finding.rule).id] = finding
    return [_row(rule, findings.get(rule.id)) for rule in rules().values()]


def _row(rule: Rule, finding: Finding | None) -> dict[str, Any]:
    printed = published().loc[rule.published] if rule.published else None
    return {
        "item": rule.item,
        "id": rule.id,
        "claim": rule.claim,
        "source": rule.source,
        "published": printed_text(rule),
        "place": "" if printed is None else printed["place"],
        "reproduced": "" if finding is None else finding.reproduced,
        "value": None if finding is None else finding.value,
        "low": None if finding is None else finding.low,
        "high": None if finding is None else finding.high,
        "count": None if finding is None else finding.count,
        "verdict": verdict(rule, finding),
        "rule": _in_words(rule),
        "notebook": rule.notebook,
    }


def _in_words(rule: Rule) -> str:
    if rule.criterion is None:
        return ""
    if rule.met == rule.not_met == rule.unclear:
        return "reported whatever it is, not judged"
    condition = {
        "covers_printed": "the 95% interval contains the printed number, as rounded",
        "above": f"the 95% interval lies above {rule.criterion.threshold}",
        "below": f"the 95% interval lies below {rule.criterion.threshold}",
        "holds": "the statement holds",
    }[rule.criterion.kind]
    text = f"{rule.met} if {condition}, else {rule.not_met}"
    if rule.criterion.kind in ("above", "below"):
        text += f"; {rule.unclear} if the interval straddles it"
    return text


def _named(name: str, records: list[dict[str, Any]], run_dir: Path) -> list[dict[str, Any]]:
    """Return a figure by its name, if a notebook has made it."""
    return [
        _figure(run_dir / record["notebook"] / "figures" / f"{name}.png", entry["caption"])
        for record in records
        for entry in record["figures"]
        if entry["name"] == name
    ]


def _item(
    name: str, rows: list[dict[str, Any]], records: list[dict[str, Any]], run_dir: Path
) -> dict[str, Any]:
    figures = [
        _figure(run_dir / record["notebook"] / "figures" / f"{entry['name']}.png", entry["caption"])
        for record in records
        for entry in record["figures"]
        if entry["item"] == name
    ]
    mine = [row for row in rows if row["item"] == name]
    pages = {
        row["notebook"]: f"{row['notebook']}/{PAGE}"
        for row in mine
        if (run_dir / row["notebook"] / PAGE).is_file()
        and any(record["notebook"] == row["notebook"] for record in records)
    }
    return {
        "name": name,
        "anchor": name.lower().replace(" ", "-").replace(".", "-"),
        "rows": mine,
        "verdicts": list(dict.fromkeys(row["verdict"] for row in mine)),
        "figures": figures,
        "pages": pages,
    }


def _figure(path: Path, caption: str) -> dict[str, Any]:
    """Return a figure to stand in the page itself, at half its pixels: it was saved for sharp screens."""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big")  # of the PNG header
    image = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"caption": caption, "image": image, "width": width // 2}
