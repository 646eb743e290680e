"""Every exhibit of the paper has a place in the library and a notebook."""

import importlib
import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from vaalign_lib.papers.printed import ITEMS
from vaalign_lib.store import DATA, NOTEBOOKS

EXHIBITS = yaml.safe_load(Path(DATA / "exhibits.yaml").read_text(encoding="utf-8"))


PAPERS = {"06_urm": "URM", "07_reward_robust": "BRME"}  # of which a notebook is, if it is not the main one
KINDS = "Assumption|Remark|Theorem|Lemma|Equation|Algorithm|Figure|Table|Appendix|Section"
NUMBER = r"\(?(?:\d+(?:\.\d+)?|[A-F]\b)\)?(?:\.\d)?(?: ?\([a-z](?:, [a-z])*\)|[a-z]\b)?"
NAMED = re.compile(
    rf"((?:URM|BRME)?)(?:'s)? ?\b({KINDS})s? ({NUMBER}(?:(?:, and |, | and | to |–|-){NUMBER})*)"
)


@cache
def named(text):
    """Return the items that a text names: of "Tables 9, 10, 16-18" five, of "Figure 6 (a, b)" one."""
    found = set()
    for paper, kind, numbers in NAMED.findall(re.sub(r"\s+", " ", text)):
        last = ""
        for through, one in re.findall(rf"(to |–|-)?({NUMBER})", numbers):
            number = re.findall(r"[A-F]|\d+(?:\.\d+)?", one)[0]
            whole = through and last.isdigit() and number.isdigit()
            many = range(int(last), int(number) + 1) if whole else [number]
            found |= {f"{paper} {kind} {each}".strip() for each in many}
            last = number
    return found


def is_named(exhibit, text):
    """Return whether a notebook's text names an item, by its paper where that is not the notebook's own."""
    item, own = exhibit["item"], PAPERS.get(exhibit["notebook"], "")
    if not re.search(rf"\b(?:{KINDS}) ", item):
        return item.lower() in text.lower()
    return bool({item, item.removeprefix(f"{own} ")} & named(text))


def resolve(name):
    """Return what a dotted name names."""
    module, found = name, []
    while module:
        try:
            place = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            found.insert(0, last)
    for part in found:
        place = getattr(place, part)
    return place


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda one: one["item"])
def test_an_exhibit_is_where_it_is_said_to_be(exhibit):
    assert callable(resolve(exhibit["holds"]))
    assert (NOTEBOOKS / f"{exhibit['notebook']}.ipynb").is_file()


def test_every_item_is_an_exhibit_once():
    items = [one["item"] for one in EXHIBITS]
    assert len(items) == len(set(items)) and set(ITEMS) <= set(items)


def test_a_name_that_leads_nowhere_is_found():
    with pytest.raises(AttributeError):
        resolve("vaalign_lib.papers.printed.nothing")


def test_every_item_is_named_in_its_notebook():
    texts = {}
    for name in {one["notebook"] for one in EXHIBITS}:
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        texts[name] = "\n".join("".join(cell["source"]) for cell in cells)
    assert [one["item"] for one in EXHIBITS if not is_named(one, texts[one["notebook"]])] == []


def test_items_are_read_from_lists_and_ranges():
    assert named("Algorithms 1–3, Tables 9, 10, 12-14") == {
        *(f"Algorithm {k}" for k in (1, 2, 3)),
        *(f"Table {k}" for k in (9, 10, 12, 13, 14)),
    }
    assert named("policies of Equations (2), (3), and\nFigure 6 (a, b)") == {
        "Equation 2", "Equation 3", "Figure 6",
    }  # fmt: skip
    assert named('item="URM Table 2", Theorem 2.4, (Figures 4a, 9); Appendix C.1') == {
        "URM Table 2", "Theorem 2.4", "Figure 4", "Figure 9", "Appendix C",
    }  # fmt: skip
    other = {"item": "URM Equation 3", "notebook": "04_ppo_runs"}
    assert not is_named(other, "Equation (3)") and is_named(other, "URM's Equation 3")
