"""HTML pages of executed notebooks that open offline: formulas as MathML, figures inside, no scripts."""

import html
import re
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from vaalign_lib.runs import write_atomically


class OfflineHTMLExporter(HTMLExporter):
    """nbconvert's page without the scripts and fonts that it would load from elsewhere."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        return with_mathml(super().markdown2html(context, source))


def with_mathml(page: str) -> str:
    """Replace $...$ and $$...$$ in HTML by MathML, which browsers draw by themselves."""

    def block(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]).strip(), display="block")

    def inline(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]).strip())

    page = re.sub(r"\$\$(.+?)\$\$", block, page, flags=re.DOTALL)
    return re.sub(r"(?<!\\)\$([^$\n]+?)\$", inline, page)


def write_page(notebook: nbformat.NotebookNode, path: Path, title: str) -> None:
    """Write an executed notebook as one self-contained HTML file."""
    exporter = OfflineHTMLExporter(  # type: ignore[no-untyped-call]
        mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url=""
    )
    exporter.exclude_anchor_links = True
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    write_atomically(path, page)
