"""HTML pages of executed notebooks: they open offline, hold figures and formulas, and run nothing.

What a notebook shows may hold texts of others: prompts, names in profiles, words of judges. HTML in it
is cut down to what tables and Markdown need, by bleach, and a policy in the page's head forbids the rest.
"""

import html
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bleach
import nbformat
from jinja2 import pass_context
from latex2mathml.converter import Converter
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from vaalign_lib.runs import write_atomically

POLICY = (Path(__file__).parent / "templates" / "policy.html").read_text(encoding="utf-8")

_SHOWN = {"text/html", "text/markdown", "text/latex", "text/plain", "image/png", "image/jpeg"}
_TEXT = (
    "a abbr b blockquote br caption code dd del div dl dt em h1 h2 h3 h4 h5 h6 hr i li ol p pre s"
)
_TABLE = "span strong sub sup table tbody td tfoot th thead tr u ul"
_MATH = (
    "math menclose merror mfrac mi mmultiscripts mn mo mover mpadded mphantom mroot mrow ms mspace "
    "msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover"
)
_ANYWHERE = ["class", "id", "colspan", "rowspan", "align", "start"]
_OF_MATH = (
    "accent accentunder columnalign columnspacing depth display displaystyle fence form height "
    "largeop linethickness lspace mathsize mathvariant maxsize minsize movablelimits notation rowspacing "
    "rspace scriptlevel separator stretchy symmetric voffset width xmlns"
)
_ATTRIBUTES = {
    "*": _ANYWHERE,
    "a": ["href", "title"],
    **{name: _OF_MATH.split() for name in _MATH.split()},
}


def cleaned(fragment: str) -> str:
    """Return HTML in which nothing runs or loads; what is not allowed is shown as text."""
    unstyled = re.sub(r"<style\b.*?</style>", "", fragment, flags=re.DOTALL)  # those of tables
    tags = f"{_TEXT} {_TABLE} {_MATH}".split()
    return bleach.clean(unstyled, tags, _ATTRIBUTES, {"http", "https", "mailto"})


def formula(latex: str, display: str) -> str:
    """Return LaTeX as MathML, which browsers draw by themselves; as it is if it cannot be read."""
    if re.search(r"\\(def|(re)?newcommand)\b", latex):  # may grow without end
        return html.escape(latex)
    try:
        tree = Converter(display=display).convert_to_element(latex.strip())
    except Exception:  # it has many, for what writers of LaTeX get wrong
        return html.escape(latex)
    for element in tree.iter():
        element.text = html.unescape(element.text or "")  # it has entities, which are escaped below
        element.tail = html.unescape(element.tail or "")
        element.attrib = {name: html.unescape(value) for name, value in element.attrib.items()}
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def block_math(self, body: str) -> str:
        return formula(body, "block")


class OfflineHTMLExporter(HTMLExporter):
    """nbconvert's page without the scripts and fonts that it would load from elsewhere."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        renderer = _Renderer(escape=False, exclude_anchor_links=True)
        return cleaned(MarkdownWithMath(renderer=renderer).render(source))


def _without_foreign_output(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy whose outputs are of kinds that run nothing, with clean HTML."""
    copy = nbformat.from_dict(notebook)
    copy.metadata.pop("widgets", None)
    copy.cells = [cell for cell in copy.cells if cell.cell_type != "raw"]
    for cell in copy.cells:
        for output in cell.get("outputs", []):
            for kind in set(output.get("data", {})) - _SHOWN:
                del output.data[kind]
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = cleaned(output.data["text/html"])
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("data", one)]
    return copy


def write_page(notebook: nbformat.NotebookNode, path: Path, title: str) -> None:
    """Write an executed notebook as one self-contained HTML file."""
    exporter = OfflineHTMLExporter(  # type: ignore[no-untyped-call]
        mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url=""
    )
    shown = _without_foreign_output(notebook)
    page, _ = exporter.from_notebook_node(shown, resources={"metadata": {"name": title}})
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)  # nbconvert's own
    write_atomically(path, page.replace("<head>", f"<head>{POLICY.strip()}", 1))
