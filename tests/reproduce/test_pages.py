"""Pages in Markdown: prose, tables, links to figures, code folded; no path, no bar, nothing alive."""

import base64
import json
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.hostile import TEXTS
from tests.reproduce.test_reproduce import FIGURE, run, write_notebook
from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce import run as module
from vaalign_lib.reproduce.pages import FINDINGS_TAG, escaped, fenced, markdown_page, tables
from vaalign_lib.store import ROOT


def page_of(folder, *outputs, source="x = 1", parameters="", after=None):
    """Return the page of a notebook with a heading, a cell with such outputs, and one without any."""
    book = folder / "01_first"
    (book / "figures").mkdir(parents=True)
    (book / "figures" / "line.png").write_bytes(b"the bytes of a figure")
    figure = {"name": "line", "item": "Figure 2", "caption": "A line."}
    record = {"profile": "smoke", "seed": 0, "figures": [figure]}
    (book / "findings.json").write_text(json.dumps(record))
    injected = new_code_cell(f"run_dir = '{folder}'{parameters}", metadata={"tags": ["injected-parameters"]})
    cells = [new_markdown_cell("# 01 · A title\n\nWith $x^2$."), injected]
    cells += [new_code_cell(source, outputs=list(outputs))]
    cells += [new_code_cell(after, metadata={"tags": [FINDINGS_TAG]})] if after else []
    cells += [new_code_cell("y = 2"), new_markdown_cell("End.")]
    nbformat.write(new_notebook(cells=cells), book / "executed.ipynb")
    return markdown_page(book)


def shown(**data):
    return new_output("display_data", {kind.replace("_", "/"): text for kind, text in data.items()})


def test_prose_stays_and_code_is_folded(tmp_path):
    page = page_of(tmp_path, shown(text_markdown="Found: **3**."))
    assert page.startswith("# 01 · A title\n\n*[The notebook](../notebooks/01_first.ipynb)")
    assert "profile smoke, seed 0" in page and "With $x^2$." in page and "Found: **3**." in page
    unfolded = re.sub("<details>.*?</details>", "", page, flags=re.S)
    assert "x = 1" in page and "x = 1" not in unfolded and "y = 2" not in unfolded and "End." in unfolded


def test_findings_are_folded_with_the_code_of_what_they_are_findings_of(tmp_path):
    shown_before = shown(text_markdown="Found: **3**.")
    for name, outputs in (("beside", [shown_before]), ("alone", [])):
        page = page_of(tmp_path / name, *outputs, after='run.finding("a.rule", "3", holds=True);')
        folds = re.findall("<details>.*?</details>", page, flags=re.S)
        assert "x = 1\n\nrun.finding(" in folds[0]  # with nothing shown, all code is in one
        assert "y = 2" in folds[-1] and len(folds) == 1 + len(outputs)


def test_a_page_says_whether_its_policies_were_trained_for_it(tmp_path):
    assert "published" not in page_of(tmp_path / "trained", parameters="\nfrom_results = False")
    assert "from the policies that are published" in page_of(
        tmp_path / "drawn", parameters="\nfrom_results = True"
    )


def test_live_bars_are_left_out_and_coloured_code_is_code(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Loading: 0%"}
    coloured = shown(text_latex=r"\begin{Verbatim} def \end{Verbatim}", text_plain="def f(): ...")
    page = page_of(tmp_path, new_output("display_data", widget), coloured, shown(text_latex="$x^3$"))
    assert "Loading" not in page and "Verbatim" not in page
    assert "```\ndef f(): ...\n```" in page and "\n$x^3$\n" in page


def test_figures_are_links_to_those_that_are_published(tmp_path):
    images = [base64.b64encode(one).decode() for one in (b"the bytes of a figure", b"another, not saved")]
    page = page_of(tmp_path, *(shown(image_png=one, text_plain="<Image>") for one in images))
    assert re.findall(r"!\[.*", page) == ["![A line.](../figures/line.png)"]
    assert "<Image>" not in page and "base64" not in page


def test_bars_warnings_and_paths_are_left_out(tmp_path):
    places = [tmp_path / "01_first" / "x.png", tmp_path, ROOT / "data" / "x.csv", Path(sys.prefix) / "lib"]
    texts = [str(one) for one in (*places, Path.home() / "mine.txt", tmp_path / ".01_first.partial" / "y")]
    outputs = [new_output("stream", name="stderr", text="counting 100%"), shown(text_markdown=texts[1])]
    outputs += [new_output("stream", name="stdout", text=text) for text in texts]
    page = page_of(tmp_path, *outputs)
    assert "counting" not in page and "\n./data/x.csv\n" in page and "\n~/mine.txt\n" in page
    for place in (tmp_path, ROOT, sys.prefix, Path.home()):
        assert f"{place}" not in page
    assert "partial" not in page and "injected" not in page and "run_dir" not in page


def test_tables_are_what_pandas_shows():
    table = pd.DataFrame({"name": ["a_b", "c|d <e>"], "value": [0.5, -1.25]}, index=[3, 4])
    expected = [["", "name", "value"], ["3", "a_b", "0.50"], ["4", "c\\|d \\<e\\>", "-1.25"]]
    for html in (table.round(2).to_html(), table.style.format(escape="html", precision=2).to_html()):
        first, rule, *rest = tables(html).splitlines()
        assert rule == "| ---: | --- | ---: |"
        assert [re.split(r" (?<!\\)\| ", line[2:-2]) for line in (first, *rest)] == expected


def test_headings_in_two_rows_and_cells_over_several(tmp_path):
    columns = pd.MultiIndex.from_tuples([("gain", "mean"), ("gain", "sd"), ("risk", "mean")])
    index = pd.MultiIndex.from_tuples([("x", 1), ("x", 2), ("y", 1)], names=["form", "arm"])
    table = pd.DataFrame([[1, 2, 3], [4, 5, 6], [7, 8, 9]], columns=columns, index=index)
    for html in (table.to_html(), table.style.to_html()):
        first, _, *rows = tables(html).splitlines()
        assert first == "| form | arm | gain mean | gain sd | risk mean |"
        assert rows == ["| x | 1 | 1 | 2 | 3 |", "|  | 2 | 4 | 5 | 6 |", "| y | 1 | 7 | 8 | 9 |"]


def test_verdicts_and_plain_results(tmp_path):
    assert "\n> not determinable\n" in page_of(tmp_path / "1", shown(text_plain="'not determinable'"))
    assert "\n```\narray([1, 2])\n```\n" in page_of(tmp_path / "2", shown(text_plain="array([1, 2])"))
    assert fenced("```") == "````\n```\n````" and fenced("") == ""


def test_nothing_of_others_is_alive_in_a_table():
    html = pd.DataFrame({"text": TEXTS}).style.format(escape="html").to_html()
    page = tables(html)
    assert len(page.splitlines()) == len(TEXTS) + 2
    assert not re.search(r"(?<!\\)[<$`\[]", page)
    assert escaped("a *b* _c_ d_e") == r"a \*b\* \_c\_ d_e"


@pytest.fixture
def study(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def test_a_notebook_that_ran_is_published_with_its_page_and_carries_its_banner(study, tmp_path):
    write_notebook(study, "01_first", FIGURE)
    assert run(tmp_path)[0] == ["done"]
    places = [tmp_path / one for one in ("figures", "results", "pages")]
    names = {path.name for path in module.publish(tmp_path / "run" / "01_first", *places)}
    assert names == {"01_first.json", "01_first_line.png", "01_first_line.pdf", "01_first.md"}
    page = (tmp_path / "pages" / "01_first.md").read_text()
    (link,) = re.findall(r"!\[A line.\]\((.*?)\)", page)
    assert (tmp_path / "pages" / link).resolve().is_file() and str(tmp_path) not in page
    assert module.publish(tmp_path / "run" / "01_first", *places) == []
    told = module.banner(load_profile("smoke")).partition(". The")[0]
    html = (tmp_path / "run" / "01_first" / "page.html").read_text()
    assert html.index("<body") < html.index(told) < html.index("A notebook with")
