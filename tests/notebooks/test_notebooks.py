"""The notebooks themselves: stripped, one parameters cell, and all of them run in the smoke profile."""

import ast
import asyncio
import json
import re
import symtable

import nbformat
import pytest
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from vaalign_lib.papers.printed import rules
from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce.pages import FINDINGS_TAG
from vaalign_lib.reproduce.run import notebooks, reproduce
from vaalign_lib.store import FIGURES, NOTEBOOKS, RESULTS

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
NAMES = ["profile", "seed", "run_dir", "figures_dir", "workers"]
OF_EXTENDED = {"urm.ppo.epistemic", "urm.ppo.aleatoric"}  # found where its published stacks have the settings
COMMITTED_ONCE = {path.stem for folder in (FIGURES, RESULTS) for path in folder.glob("*.*")}


def read(path):
    return nbformat.read(path, as_version=4)


def test_all_notebooks_belong_to_the_study():
    assert [book.path for book in notebooks()] == PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stripped_of_outputs(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_opened_by_hand_nothing_is_trained_for_an_hour(path):
    source = next(cell.source for cell in read(path).cells if "parameters" in cell.metadata.get("tags", []))
    assert "from_results = False" not in source  # `vaalign reproduce` says so itself


def test_lab_saves_notebooks_as_they_are_committed(tmp_path):
    """The whole study, executed and saved in JupyterLab with the settings of `make lab`, is unchanged."""
    app = ServerApp(config_file=str(NOTEBOOKS / "lab_config.py"))
    app.load_config_file()
    manager = AsyncLargeFileManager(root_dir=str(tmp_path), config=app.config)
    for path in PATHS:
        notebook = read(path)
        notebook.metadata.language_info["version"] = "3.99"
        for cell in (one for one in notebook.cells if one.cell_type == "code"):
            cell.execution_count, cell.metadata["execution"] = 3, {"shell.execute_reply": "now"}
            cell.outputs = [nbformat.v4.new_output("stream", text="much")]
        model = {"type": "notebook", "format": "json", "content": notebook}
        asyncio.run(manager.save(model, path.name))
        assert (tmp_path / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_one_parameters_cell_with_the_five_names_and_a_comment_each(path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = tagged[0].source.splitlines()
    names = [re.match(r"(\w+) = ", line)[1] for line in lines]
    assert names[: len(NAMES)] == NAMES  # what a notebook has beyond them comes after
    assert all("  # " in line for line in lines)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_cells_define_no_long_functions(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            for body in re.findall(r"^def .*?(?=^\S|\Z)", cell.source, flags=re.M | re.S):
                assert len(body.splitlines()) <= 6


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_cells_fit_a_screen(path):
    for cell in read(path).cells:
        lines = cell.source.splitlines()
        assert cell.cell_type == "markdown" or len(lines) <= 25, cell.source
        whole = [line for line in lines if len(line) > 120 and not line.lstrip().startswith(("|", "$$"))]
        assert whole == []  # rows of tables and formulas cannot be broken


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_findings_stand_in_cells_of_their_own_folded_in_lab(path):
    """They compute nothing that another cell reads, and show nothing: a reader can pass over them."""
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    set_in: dict[str, int] = {}  # where a name was assigned last
    for position, cell in enumerate(code):
        found = "run.finding(" in cell.source
        assert found == (FINDINGS_TAG in cell.metadata.get("tags", [])), cell.source
        assert found == cell.metadata.get("jupyter", {}).get("source_hidden", False)
        shows = isinstance(ast.parse(cell.source).body[-1], ast.Expr) and not cell.source.endswith(";")
        assert not (found and shows), cell.source
        assigned, read_there = names_of(cell.source)
        used = {name: code[set_in[name]].source for name in read_there & set_in.keys()}
        assert not {name for name, source in used.items() if "run.finding(" in source}, cell.source
        set_in |= dict.fromkeys(assigned, position)


def names_of(source):
    """Return the names that a cell assigns, and those that it reads and does not assign itself."""
    top = symtable.symtable(source, "cell", "exec")
    assigned = {one.get_name() for one in top.get_symbols() if one.is_assigned()}
    read, tables = set(), [top]
    while tables:
        table = tables.pop()
        symbols = [one for one in table.get_symbols() if table is top or one.is_global()]
        read |= {one.get_name() for one in symbols if one.is_referenced()}
        tables += table.get_children()
    return assigned, read - assigned


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    outcomes = reproduce(load_profile("smoke"), profile_source="smoke", run_dir=folder)
    return folder, {outcome.notebook: outcome for outcome in outcomes}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs_in_the_smoke_profile(path, smoke_run):
    folder, outcomes = smoke_run
    assert outcomes[path.stem].state == "done", outcomes[path.stem].message
    record = json.loads((folder / path.stem / "findings.json").read_text())
    judged = {finding["rule"] for finding in record["findings"]}
    assert judged == {rule.id for rule in rules().values() if rule.notebook == path.stem} - OF_EXTENDED
    for figure in record["figures"]:
        assert (folder / path.stem / "figures" / f"{figure['name']}.png").stat().st_size > 5000
    page = (folder / path.stem / "page.html").read_text()
    assert page.count("data:image/png;base64") >= len(record["figures"])  # every figure is shown


def test_committed_figures_and_tables_are_those_the_notebooks_make(smoke_run):
    folder, _ = smoke_run
    made = {path.name for part in ("figures", "tables") for path in folder.glob(f"*/{part}/*")}
    committed = {path.name for part in (FIGURES, RESULTS) for path in part.glob("*.*")}
    assert made == committed


def test_other_profiles_leave_the_committed_results_alone(smoke_run):
    """The smoke run above wrote into its own folder only."""
    assert {path.stem for part in (FIGURES, RESULTS) for path in part.glob("*.*")} == COMMITTED_ONCE
    assert all("profile smoke" not in path.read_bytes().decode("latin-1") for path in FIGURES.glob("*.png"))


def test_published_runs_draw_the_committed_figures_without_training(tmp_path):
    profile = load_profile("embedded")
    options = {"profile_source": "embedded", "run_dir": tmp_path, "only": "04"}
    (outcome,) = reproduce(profile, from_results=True, **options)
    assert outcome.state == "done", outcome.message
    assert not (tmp_path / "store").exists()
    made = tmp_path / outcome.notebook / "tables" / "comparisons.md"
    ours, theirs = (path.read_text().split() for path in (made, RESULTS / "comparisons.md"))
    assert ours == theirs
