"""Every exhibit of the paper has a place in the library and a notebook."""

import importlib
from pathlib import Path

import pytest
import yaml

from vaalign_lib.papers.printed import ITEMS
from vaalign_lib.store import DATA, NOTEBOOKS

EXHIBITS = yaml.safe_load(Path(DATA / "exhibits.yaml").read_text(encoding="utf-8"))


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
