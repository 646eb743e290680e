"""Pages open offline: formulas as MathML, no scripts, nothing loaded from elsewhere."""

import html
import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from tests.hostile import TEXTS, alive
from tests.reproduce.test_reproduce import FIGURE, write_notebook
from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce import run
from vaalign_lib.reproduce import run as reproduce
from vaalign_lib.reproduce.execute import write_page
from vaalign_lib.reproduce.notebook import quoted
from vaalign_lib.reproduce.report import write_report
from vaalign_lib.store import NOTEBOOKS


def page_of(folder, *cells):
    write_page(new_notebook(cells=list(cells)), folder / "page.html", "title")
    return (folder / "page.html").read_text()


def test_formulas_become_mathml(tmp_path):
    text = "Let $a < b$ and\n\n$$\\sum_i x_i^2 \\le \\varepsilon$$\n\nfor 5 dollars; `$x$` costs $5"
    page = page_of(tmp_path, new_markdown_cell(text))
    assert page.count("<math") == 2 and 'display="block"' in page and "ε" in page
    assert "<code>$x$</code> costs $5" in page
    assert "<mrow><mi>a</mi><mo>&lt;</mo><mi>b</mi></mrow></math>" in page


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_formula_of_the_study_is_drawn(path, tmp_path):
    cells = [one for one in nbformat.read(path, 4).cells if one.cell_type == "markdown"]
    formulas = [found for one in cells for found in re.findall(r"\$\$.+?\$\$|\$[^$\n]+?\$", one.source, re.S)]
    page = page_of(tmp_path, *cells)
    assert page.count("<math") == len(formulas)


def test_pages_load_nothing(tmp_path):
    output = new_output("display_data", {"text/html": "<b>table</b><script>alert(1)</script>"})
    notebook = new_notebook(cells=[new_markdown_cell("Title $x$"), new_code_cell("1 + 1", outputs=[output])])
    write_page(notebook, tmp_path / "page.html", "title")
    page = (tmp_path / "page.html").read_text()
    assert "<math" in page and "<b>table</b>" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)=["\']?(?:https?:)?//', page)
    assert "@import" not in page


OUTPUTS = {
    "text/html": TEXTS,
    "text/markdown": TEXTS,
    "text/latex": TEXTS,
    "text/plain": TEXTS,
    "image/svg+xml": ["<svg onload=alert(1)></svg>"],
    "application/javascript": ["alert(1)"],
    "text/vnd.mermaid": TEXTS,
    "application/vnd.jupyter.widget-view+json": [{"model_id": "</script><script>alert(1)"}],
}


def test_hostile_texts_alive_in_a_page(tmp_path):
    """None, by whatever way they come into it."""
    shown = [new_output("display_data", {kind: text}) for kind, texts in OUTPUTS.items() for text in texts]
    shown += [new_output("stream", name="stdout", text=text) for text in TEXTS]
    shown += [new_output("error", ename=one, evalue=one, traceback=[one]) for one in TEXTS]
    cells = [new_code_cell("\n".join(TEXTS), outputs=shown)]
    cells += [make(text) for text in TEXTS for make in (new_markdown_cell, new_raw_cell)]
    page = page_of(tmp_path, *cells)
    assert alive(page) == []
    assert "default-src 'none'" in page[: page.index("<title>")]
    assert alive("".join(TEXTS)), "the measure sees what is alive"


def test_quoted_texts_are_read_as_they_are(tmp_path):
    text = r"a *b* _c_ `d` $e$ [f](javascript:g) <h> &lt; \i ~~j~~ # k | l ! ü 漢"
    page = page_of(tmp_path, new_markdown_cell(f"Prompt: {quoted(text)}."))
    (shown,) = re.findall(r"<p>Prompt: (.*?)\.</p>", page)
    assert html.unescape(shown) == text and "<" not in shown


def test_a_notebook_shows_texts_of_others_as_texts(tmp_path, monkeypatch):
    """Tables, their headings, Markdown: in what JupyterLab draws, too, which does not clean."""
    monkeypatch.setattr(reproduce, "NOTEBOOKS", tmp_path)
    table = "import json\nimport pandas as pd\nfrom IPython.display import Markdown, display\n"
    table += f"texts = json.loads({json.dumps(json.dumps(TEXTS))})\n"
    table += "table = pd.DataFrame([texts], columns=texts, index=texts[:1])"
    shows = "for one in (table, table.style, table.style.format(precision=2, escape='html')):\n"
    shows += "    display(one)\nfor text in texts:\n    display(Markdown(text))\n    print(text)"
    write_notebook(
        tmp_path, "01_texts", *(one.replace("{", "{{").replace("}", "}}") for one in (table, shows)), FIGURE
    )
    smoke = load_profile("smoke").model_copy(update={"description": TEXTS[1]})
    run_dir = tmp_path / "run"
    (outcome,) = run.reproduce(smoke, profile_source="smoke", run_dir=run_dir)
    assert outcome.state == "done", outcome.message
    executed = nbformat.read(run_dir / "01_texts" / "executed.ipynb", 4)
    outputs = [one for cell in executed.cells for one in cell.get("outputs", []) if "data" in one]
    tables = [one.data["text/html"] for one in outputs if "text/html" in one.data]
    assert len(tables) == 3 and not any(alive(one) for one in tables)
    texts = [one.data["text/markdown"] for one in outputs if "text/markdown" in one.data]
    assert len(texts) == len(TEXTS) and not any(re.search("<[a-z/]", one) for one in texts)
    assert alive((run_dir / "01_texts" / "page.html").read_text()) == []
    report = write_report(smoke, run_dir).read_text()
    assert alive(report) == [] and "default-src 'none'" in report


def test_tables_of_the_study_escape(tmp_path):
    cells = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in nbformat.read(path, 4).cells]
    formats = re.findall(r"\.style\.format\((?:[^()]|\([^()]*\))*\)", "\n".join(one.source for one in cells))
    assert len(formats) > 15 and [one for one in formats if 'escape="html"' not in one] == []
