"""The report of what is published: index first, questions as headings, small, and right in a browser."""

import json
import re
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.reproduce.browser import BROWSER, browser
from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce.execute import PAGE, write_page
from vaalign_lib.reproduce.report import write_report
from vaalign_lib.reproduce.run import _take, notebook_key, notebooks
from vaalign_lib.store import RESULTS

WIDTHS = (390, 1280)
LARGEST = 10 * 10**6  # bytes of the report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return the report of the published figures and findings, with a page for one notebook."""
    folder, profile = tmp_path_factory.mktemp("run"), load_profile("embedded")
    for book in notebooks():
        if (RESULTS / "findings" / f"{book.name}.json").is_file():
            assert _take(book, notebook_key(book, profile, 0), folder, {}).state == "taken"
    page_of_a_notebook(folder / "01_bandit" / PAGE)
    return write_report(profile, folder)


def page_of_a_notebook(path):
    """Write a page with what is wide: a table, a line of code, a formula, a long name."""
    table = pd.DataFrame({f"a column with a long name {k}": [1.23456789] * 3 for k in range(12)})
    cells = [
        new_markdown_cell("# A title\n\nWith `" + "a.long.dotted.name." * 8 + "`\n\n" + table.to_markdown()),
        new_markdown_cell("$$\\sum_i x_i = " + "+".join(f"\\alpha_{{{k}}}^2" for k in range(60)) + "$$"),
        new_code_cell(
            "x = '" + "y" * 300 + "'",
            outputs=[
                new_output("display_data", {"text/html": table.to_html()}),
                new_output("stream", name="stdout", text="z" * 300 + "\n"),
            ],
        ),
    ]
    notebook = new_notebook(cells=cells)
    nbformat.validate(notebook)
    write_page(notebook, path, "a title")


class Outline(HTMLParser):
    """The order of elements with their text."""

    def __init__(self, page):
        super().__init__()
        self.parts = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.parts.append([tag, ""])

    def handle_data(self, data):
        if self.parts:
            self.parts[-1][1] += data


def test_the_report_is_small_and_opens_with_its_index(report):
    assert report.stat().st_size < LARGEST
    parts = Outline(report.read_text(encoding="utf-8")).parts
    order = [tag for tag, _ in parts]
    assert order.index("h1") < order.index("nav") < order.index("h2") < order.index("img")
    asked = [text.strip(" ·\n") for tag, text in parts if tag == "h2"]
    assert len(asked) > 6 and all(one.endswith("?") for one in asked)


def test_every_figure_of_the_published_notebooks_is_shown_once(report):
    page = report.read_text(encoding="utf-8")
    records = [json.loads(path.read_text()) for path in (RESULTS / "findings").glob("*.json")]
    names = {one["name"] for record in records for one in record["figures"]}
    shown = re.findall(r'<figure id="figure-(\w+)">', page)
    assert len(shown) == len(set(shown)) and set(shown) <= names
    assert len(shown) > 0.8 * len(names)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_pages_without_errors_or_sideways_scrolling(report, tmp_path):
    with browser(tmp_path / "profile") as page:
        for path in (report, report.parent / "01_bandit" / PAGE):
            for width in WIDTHS:
                seen = page.look(path, width)
                assert seen["scrolled"] <= seen["width"] <= width, (path.name, width, seen["wide"])
                assert not seen["broken"] and not seen["lost"] and not seen["repeated"], (path.name, seen)
                assert all((path.parent / one).exists() for one in seen["files"]), seen["files"]
                assert seen["images"] > 30 or path != report
        assert not page.said


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_browser_sees_what_is_wrong(tmp_path):
    wrong = "<p style='width: 900px'>wide</p><a href='#no'>lost</a><img src='data:,'><script>x()</script>"
    (tmp_path / "page.html").write_text(
        f"<!DOCTYPE html><meta name=viewport content='width=device-width'>{wrong}"
    )
    with browser(tmp_path / "profile") as page:
        seen = page.look(tmp_path / "page.html", 390)
        assert seen["scrolled"] > 390 and seen["lost"] == ["no"] and seen["broken"] == 1
        assert page.said
