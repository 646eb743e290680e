"""The report: a scoreboard, a summary, and every figure and table of a run folder."""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image
from pydantic import BaseModel, ConfigDict, field_validator

from vaalign_lib.papers.printed import (
    FURTHER_ITEMS,
    ITEMS,
    MEANINGS,
    Finding,
    Rule,
    meanings,
    printed_text,
    published,
    rule_of,
    rules,
    verdict,
)
from vaalign_lib.profiles import Profile
from vaalign_lib.reproduce.execute import FINDINGS, PAGE
from vaalign_lib.reproduce.run import PAGES, State, banner, states
from vaalign_lib.store import DATA, RESULTS, ROOT, write_atomically

VERDICTS = {  # heading by verdict, in their order
    one: one.capitalize() for one in MEANINGS if one not in ("needs the paper profile", "not yet")
}
FINDINGS_PAGE = ROOT / "docs" / "findings.md"
CHECK = "check.json"  # in the run folder: how it compares with what is published


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- the scoreboard -----------------------------------------------------------------------------------


class Row(_Strict):
    """A rule of the scoreboard: what is printed, what was found with its interval, the verdict on it."""

    item: str
    id: str
    claim: str
    source: str
    published: str
    place: str
    reproduced: str
    value: float | None
    low: float | None
    high: float | None
    count: int | None
    verdict: str
    rule: str
    notebook: str


def scoreboard(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return a row for every rule, from the records of notebooks.

    Raises:
        UnknownRuleError: a finding has no rule.
    """
    found = [Finding.model_validate(entry) for record in records for entry in record["findings"]]
    findings = {rule_of(one.rule).id: one for one in found}
    nothing = Finding(rule="", reproduced="")
    return [
        Row(
            **rule.model_dump(include={"item", "id", "claim", "source", "notebook"}),
            **findings.get(rule.id, nothing).model_dump(exclude={"rule", "holds", "clear"}),
            published=printed_text(rule),
            place=published().loc[rule.published, "place"] if rule.published else "",
            verdict=verdict(rule, findings.get(rule.id)),
            rule=_in_words(rule),
        )
        for rule in rules().values()
    ]


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
    if rule.criterion.seen is not None:
        text += f" if it lies below {rule.criterion.seen}; otherwise {rule.unclear}"
    elif rule.criterion.kind in ("above", "below"):
        text += f"; {rule.unclear} if the interval straddles it"
    return text


def published_rows(results: Path = RESULTS) -> list[Row]:
    """Return the scoreboard of the findings that are committed."""
    return scoreboard(map(_read, sorted((results / "findings").glob("*.json"))))


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


# --- the summary --------------------------------------------------------------------------------------


class Line(_Strict):
    """A finding that the summary holds, by its rule: what it is about and how it is written."""

    rule: str
    text: str
    found: str = "{text}"
    logarithm: bool = False

    @field_validator("rule")
    @classmethod
    def _known(cls, name: str) -> str:
        return rule_of(name).id


class Summary(_Strict):
    """What the summary consists of, and what the report asks; see data/summary.yaml."""

    stand_ins: str
    figures: list[str]
    questions: dict[str, str]  # by notebook
    lines: list[Line]


def settings() -> Summary:
    return Summary.model_validate(yaml.safe_load((DATA / "summary.yaml").read_text(encoding="utf-8")))


def summary(rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
    """Return the lines of the summary, each with `text`, `found`, `command` and `item`, by the heading of
    their verdict; what has not been found yet is left out.
    """
    by_id = {row.id: row for row in rows}
    found: dict[str, list[dict[str, str]]] = {}
    for line, row in ((line, by_id[line.rule]) for line in settings().lines):
        if row.verdict in VERDICTS:
            numbers = row.model_dump(include={"value", "low", "high"})
            if line.logarithm:
                numbers = {name: math.exp(number) for name, number in numbers.items()}
            one = {
                "text": line.text.format(printed=row.published),
                "found": line.found.format(text=row.reproduced, **numbers),
                "command": f"vaalign reproduce --only {row.notebook[:2]}",
                "item": row.item,
            }
            found.setdefault(VERDICTS[row.verdict], []).append(one)
    return {heading: found[heading] for heading in VERDICTS.values() if heading in found}


def markdown(rows: Sequence[Row]) -> str:
    """Return the summary as a Markdown table, with the command that makes each number, and below it what
    its verdicts mean.
    """
    lines, by_verdict = ["| | what | found here | command |", "|---|---|---|---|"], summary(rows)
    for heading, found in by_verdict.items():
        for k, one in enumerate(found):
            name = f"**{heading}**" if k == 0 else ""
            text, found_here = (one[part].replace("|", "\\|") for part in ("text", "found"))
            lines.append(f"| {name} | {text} | {found_here} | `{one['command']}` |")
    words = meanings(heading.lower() for heading in by_verdict)
    return "\n\n".join([settings().stand_ins, "\n".join(lines), words]).rstrip() + "\n"


def page_list(folder: Path = PAGES) -> str:
    """Return a line of Markdown for every page that is published, with its heading."""
    first = {
        path: path.read_text(encoding="utf-8").partition("\n")[0] for path in sorted(folder.glob("*.md"))
    }
    lines = [f"- [{one.lstrip('# ')}](../pages/{path.name})\n" for path, one in first.items()]
    return "".join(["Every notebook with its results:\n\n", *lines] if lines else [])


def published_parts() -> dict[str, str]:
    """Return what `vaalign publish` writes into the page of findings, by the name in its marks."""
    return {"summary": markdown(published_rows()), "pages": page_list()}


def marks(name: str) -> tuple[str, str]:
    """Return the lines of the page between which a part of it stands."""
    return f"<!-- {name}, written by vaalign publish -->", f"<!-- end of the {name} -->"


def write_into_page(parts: Mapping[str, str], page: Path = FINDINGS_PAGE) -> bool:
    """Put each part between its two marks in the page; return whether that changed it."""
    before = text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = marks(name)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page}: expected the lines {begin!r} and {end!r} once each")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{part}{end}{rest.partition(end)[2]}"
    if text != before:
        write_atomically(page, text)
    return text != before


# --- the page -----------------------------------------------------------------------------------------


def write_report(profile: Profile, run_dir: Path, seed: int = 0) -> Path:
    """Write report.html, which opens offline, and scoreboard.json from a run folder; return the page.

    A notebook counts if it ran with the cells, library, inputs and seed of now; outdated ones are named.
    """
    found = states(profile, run_dir, seed)
    current = [one.notebook.name for one in found if one.current]
    records = [_read(run_dir / name / FINDINGS) for name in current]
    rows, figures = scoreboard(records), _figures(records, run_dir)
    content = json.dumps([row.model_dump() for row in rows], indent=1)
    write_atomically(run_dir / "scoreboard.json", content + "\n")
    pages = {name: f"{name}/{PAGE}" for name in current if (run_dir / name / PAGE).is_file()}
    environment = Environment(
        loader=PackageLoader("vaalign_lib.reproduce"), autoescape=select_autoescape(["html", "jinja"])
    )
    page = environment.get_template("report.html.jinja").render(
        profile=profile,
        banner=banner(profile),
        check=_check(run_dir, found),
        summary=summary(rows),
        stand_ins=settings().stand_ins,
        headline=[one for name in settings().figures for one in figures if one["name"] == name],
        sections=_sections(rows, figures, pages),
        counts=Counter(row.verdict for row in rows),
        meanings=MEANINGS,
        notebooks=[record["notebook"] for record in records],
        taken=[record["notebook"] for record in records if record.get("taken")],
        outdated=[one.notebook.name for one in found if one.record and not one.current],
        claims=len(rows),
    )
    write_atomically(run_dir / "report.html", page)
    return run_dir / "report.html"


def _check(run_dir: Path, found: Sequence[State]) -> dict[str, Any] | None:
    """Return how the run compares with what is published, if that was asked of these very notebooks."""
    finished = {one.notebook.name: one.record["finished"] for one in found if one.record}
    outcome = _read(run_dir / CHECK) if (run_dir / CHECK).is_file() else {}
    return outcome if outcome.get("finished") == finished else None


def exhibits() -> dict[str, dict[str, str]]:
    """Return every item of the report, those with rules first, with what data/exhibits.yaml says of it."""
    listed = yaml.safe_load((DATA / "exhibits.yaml").read_text(encoding="utf-8"))
    return {name: {} for name in ITEMS + FURTHER_ITEMS} | {one["item"]: one for one in listed}


def _sections(
    rows: Sequence[Row], figures: Sequence[Mapping[str, Any]], pages: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return what the page shows under each question, a notebook's each."""
    asked: dict[str, list[dict[str, Any]]] = {}
    known = settings()
    for name, exhibit in exhibits().items():
        mine = [row for row in rows if row.item == name]
        notebook = exhibit.get("notebook") or mine[0].notebook
        asked.setdefault(notebook, []).append(
            _item(name, mine, figures, known.figures) | {"exhibit": exhibit}
        )
    return [
        {
            "anchor": notebook,
            "question": known.questions.get(notebook, f"What does {notebook} show?"),
            "page": pages.get(notebook),
            "items": asked[notebook],
        }
        for notebook in sorted(asked)
    ]


def _item(
    name: str, rows: Sequence[Row], figures: Sequence[Mapping[str, Any]], above: Sequence[str]
) -> dict[str, Any]:
    """Return what the page shows of an item; a figure that stands above is not shown again."""
    mine = [one for one in figures if one["item"] == name]
    return {
        "name": name,
        "anchor": re.sub("[ .]", "-", name.lower()),
        "rows": rows,
        "verdicts": list(dict.fromkeys(row.verdict for row in rows)),
        "figures": [one for one in mine if one["name"] not in above],
        "above": [one for one in mine if one["name"] in above],
    }


def _figures(records: Sequence[Mapping[str, Any]], run_dir: Path) -> list[dict[str, Any]]:
    """Return all figures to stand in the page itself, at half their pixels: saved for sharp screens."""
    figures = []
    for record in records:
        for entry in record["figures"]:
            with Image.open(run_dir / record["notebook"] / "figures" / f"{entry['name']}.png") as image:
                small = BytesIO()  # the same pixels in less than half the bytes
                image.save(small, "WEBP", lossless=True, quality=30, method=1)
                source = "data:image/webp;base64," + base64.b64encode(small.getvalue()).decode()
                figures.append(entry | {"image": source, "width": image.width // 2})
    return figures
