"""Pages open offline: formulas as MathML, no scripts, nothing loaded from elsewhere."""

import re

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vaalign_lib.html_pages import with_mathml, write_page


def test_formulas_become_mathml():
    page = with_mathml(
        "<p>Let $a &lt; b$ and $$\\sum_i x_i^2 \\le \\varepsilon$$ for 5 dollars.</p>"
    )
    assert page.count("<math") == 2 and 'display="block"' in page and "$" not in page
    assert with_mathml("costs $5") == "costs $5"


def test_pages_load_nothing(tmp_path):
    output = new_output("display_data", {"text/html": "<b>table</b><script>alert(1)</script>"})
    notebook = new_notebook(
        cells=[new_markdown_cell("Title $x$"), new_code_cell("1 + 1", outputs=[output])]
    )
    write_page(notebook, tmp_path / "page.html", "title")
    page = (tmp_path / "page.html").read_text()
    assert "<math" in page and "<b>table</b>" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)=["\']?(?:https?:)?//', page)
    assert "@import" not in page
