"""Executed notebooks as Markdown pages, which read well where a repository is browsed."""

import ast
import base64
import json
import re
import sys
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup, Tag

from vaalign_lib.reproduce.execute import EXECUTED, FINDINGS
from vaalign_lib.store import ROOT

FINDINGS_TAG = "findings"  # of cells that only say what was found; their code is folded in JupyterLab
_NUMBER = re.compile(r"[-−+]?[\d.,]+(e[-+]?\d+)?%?|nan|", re.IGNORECASE)


def markdown_page(folder: Path) -> str:
    """Return the executed notebook of a run as Markdown: prose, results, figures, and code folded away.

    Its figures are links to where they are published, beside the pages. What a notebook wrote to its stderr
    (warnings, progress bars) is left out, and so are the paths of the machine.
    """
    record = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
    figures = {
        (folder / "figures" / f"{one['name']}.png").read_bytes(): f"![{escaped(one['caption'])}]"
        f"(../figures/{one['name']}.png)"
        for one in record["figures"]
    }
    parts: list[str | list[str]] = []  # what is shown, and between it lists of code
    code: list[str] = []  # since what was shown last
    last: list[str] | None = None  # the code of what was shown last, if no text came after it
    drawn = ""
    for cell in nbformat.read(folder / EXECUTED, as_version=4).cells:
        injected = "injected-parameters" in cell.metadata.get("tags", [])
        if injected and "from_results = True" in cell.source:
            drawn = ", from the policies that are published"
        shown = [cell.source] if cell.cell_type == "markdown" else []
        shown += filter(None, (_shown(output, figures) for output in cell.get("outputs", [])))
        if FINDINGS_TAG in cell.metadata.get("tags", []) and not (shown or code) and last is not None:
            last.append(cell.source)  # beside what they are findings of
            continue
        if cell.cell_type == "code" and not injected:
            code.append(cell.source)
        if shown:
            last = code if cell.cell_type == "code" else None
            parts += [code, *shown] if code else shown
            code = []
    texts = [one if isinstance(one, str) else _folded(fenced("\n\n".join(one), "python")) for one in parts]
    heading, _, rest = "\n\n".join(texts).partition("\n")
    name = folder.name
    origin = (
        f"*[The notebook](../notebooks/{name}.ipynb) as `vaalign reproduce --only {name[:2]}` ran it: "
        f"profile {record['profile']}, seed {record['seed']}{drawn}.*"
    )
    return without_paths(f"{heading}\n\n{origin}\n{rest}\n", folder)


def _shown(output: Any, figures: Mapping[bytes, str]) -> str:
    """Return an output of a cell as Markdown; nothing for those that are no results."""
    if output.output_type == "stream":
        return fenced(output.text.rstrip()) if output.name == "stdout" else ""
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:  # a bar, or sliders, which no page can move
        return ""
    if "image/png" in data:
        return figures.get(base64.b64decode(data["image/png"]), "")
    if "text/markdown" in data:
        fold = r"^```python\n.*?^```$"
        return re.sub(fold, lambda code: _folded(code[0]), data["text/markdown"], flags=re.M | re.S)
    if "<table" in data.get("text/html", ""):
        return tables(data["text/html"])
    latex = data.get("text/latex", "")
    if latex.startswith("$"):  # a formula, and no coloured code
        return latex
    text = data.get("text/plain", "")
    if re.fullmatch(r"'[^'\n]*'|\"[^\"\n]*\"", text):  # a verdict
        return f"> {escaped(ast.literal_eval(text))}"
    return fenced(text)


def _folded(block: str) -> str:
    return f"<details><summary>Code</summary>\n\n{block}\n\n</details>"


def fenced(text: str, language: str = "") -> str:
    """Return a text as a block of code, whatever backticks it has; nothing for none."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}" if text else ""


def escaped(text: str) -> str:
    """Return a text in one line in which nothing is markup, HTML or a formula."""
    return re.sub(r"([\\`*\[\]<>|$~&]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def tables(fragment: str) -> str:
    """Return the tables of HTML as Markdown, with the paragraphs below them."""
    found = BeautifulSoup(fragment, "html.parser").find_all(["table", "p"])
    return "\n\n".join(_table(one) if one.name == "table" else escaped(one.get_text()) for one in found)


def _table(table: Tag) -> str:
    """Return a table as Markdown: rows of the heading are joined, what spans rows stands in the first."""
    heading: list[list[str]] = []
    body: list[list[str]] = []
    spans: dict[int, int] = {}  # by column, rows that a cell above still takes
    for line in table.find_all("tr"):
        row: list[str] = []
        for cell in line.find_all(["th", "td"]):
            while spans.get(len(row), 0) > 0:
                spans[len(row)] -= 1
                row.append("")
            for _ in range(int(str(cell.get("colspan", "1")))):
                spans[len(row)] = int(str(cell.get("rowspan", "1"))) - 1
                row.append(escaped(cell.get_text()))
        (heading if line.find_parent("thead") else body).append(row)
    names = [" ".join(dict.fromkeys(filter(None, one))) for one in zip_longest(*heading, fillvalue="")]
    numbers = [all(map(_NUMBER.fullmatch, one)) for one in zip_longest(*body, fillvalue="")]
    rule = ["---:" if right else "---" for right, _ in zip_longest(numbers, names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, rule, *body))


def without_paths(text: str, folder: Path) -> str:
    """Return a text without the paths of this machine: those of the run folder, project, user."""
    places = {folder.parent.resolve(): folder.parent.name, Path(sys.prefix): ".venv", Path.home(): "~"}
    for place, name in {**places, ROOT: "."}.items():
        if len(place.parts) > 1:
            text = name.join(re.split(rf"{re.escape(str(place))}(?![\w.-])", text))
    return text.replace(f".{folder.name}.partial", folder.name)
