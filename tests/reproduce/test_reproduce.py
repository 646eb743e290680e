"""Running notebooks: once per inputs, in order, failures contained, nothing half-written."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce import run as module
from vaalign_lib.reproduce.execute import EXECUTED, PAGE
from vaalign_lib.reproduce.run import finished_record, publish, reproduce, status

PARAMETERS = 'profile = "smoke"\nseed = 0\nrun_dir = ""\nfigures_dir = ""\nworkers = 0'
START = """
from vaalign_lib.reproduce.notebook import start
paths = {{"run_dir": run_dir, "figures_dir": figures_dir}}
run = start("{name}", profile=profile, seed=seed, workers=workers, **paths)
"""
FIGURE = """
from matplotlib.figure import Figure
figure = Figure()
figure.subplots().plot([1, 2])
run.save_figure(figure, "{name}_line", item="Figure 2", caption="A line.")
"""


def write_notebook(folder, name, *cells):
    """Write a notebook; one that has nothing to save starts no run, for its imports take seconds."""
    parameters = new_code_cell(PARAMETERS)
    parameters.metadata["tags"] = ["parameters"]
    starts = [START] if any("run." in cell for cell in cells) else []
    body = [new_code_cell(cell.format(name=name)) for cell in (*starts, *cells)]
    notebook = new_notebook(cells=[new_markdown_cell("# A notebook with $x^2$"), parameters, *body])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def study(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(module, "NOTEBOOKS", folder)
    return folder


def run(tmp_path, **options):
    outcomes = reproduce(load_profile("smoke"), profile_source="smoke", run_dir=tmp_path / "run", **options)
    return [outcome.state for outcome in outcomes], outcomes


def test_runs_once_then_keeps_then_follows_changes(study, tmp_path):
    write_notebook(study, "01_first", FIGURE)
    assert run(tmp_path)[0] == ["done"]
    folder = tmp_path / "run" / "01_first"
    for name in (EXECUTED, PAGE, "findings.json", "figures/01_first_line.png", "figures/01_first_line.pdf"):
        assert (folder / name).is_file()
    page = (folder / PAGE).read_text()
    assert "data:image/png;base64" in page
    assert "<math" in page and "<script" not in page and "$x^2$" not in page
    assert run(tmp_path)[0] == ["kept"]
    assert run(tmp_path, force=True)[0] == ["done"]
    assert run(tmp_path, seed=1)[0] == ["done"]
    (folder / "figures" / "01_first_line.png").unlink()
    assert run(tmp_path, seed=1)[0] == ["done"]  # a lost file is made again
    write_notebook(study, "01_first", FIGURE, "1 + 1")
    assert status(load_profile("smoke"), tmp_path / "run", seed=1)[0][1] == "outdated"
    assert run(tmp_path, seed=1)[0] == ["done"]


def test_what_was_set_or_drawn_from_results_is_current_and_never_passes_for_trained(study, tmp_path):
    write_notebook(study, "01_first", "chosen = pairs, from_results")
    path = study / "01_first.ipynb"
    content = nbformat.read(path, as_version=4)
    content.cells[1].source += "\npairs = ''\nfrom_results = True"
    nbformat.write(content, path)
    for options in ({"settings": {"pairs": "mine"}}, {"from_results": True}):
        assert run(tmp_path, **options)[0] == ["done"]
        assert status(load_profile("smoke"), tmp_path / "run")[0][1] == "done"  # so the report shows it
        assert run(tmp_path)[0] == ["done"]


def test_the_notebook_runs_here_whatever_else_is_installed(study, tmp_path, monkeypatch):
    """Another environment's python3, start-up files, a matplotlibrc; braces in the name of the folder."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    started = tmp_path / "ipython" / "profile_default" / "startup" / "00.py"
    for path in (kernel, started):
        path.parent.mkdir(parents=True)
    theirs = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    kernel.write_text(json.dumps(theirs))
    started.write_text("leaked = 1")
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: black\nfont.size: 30\n")
    write_notebook(
        study,
        "01_here",
        FIGURE,
        f"import sys\nassert sys.executable == {sys.executable!r}",
        "assert 'leaked' not in globals()",
        "import matplotlib\nassert matplotlib.rcParams['font.size'] == 10",
    )
    run_dir = tmp_path / "run {x} {0} {"
    options = {"profile_source": "smoke", "run_dir": run_dir}
    assert [one.state for one in reproduce(load_profile("smoke"), **options)] == ["done"]
    plain = run_dir / "01_here" / "figures" / "01_here_line.png"
    kept = plain.read_bytes()
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path))
    (outcome,) = reproduce(load_profile("smoke"), force=True, **options)
    assert outcome.state == "done", outcome.message
    assert plain.read_bytes() == kept


def test_a_failure_is_reported_and_contained(study, tmp_path):
    write_notebook(study, "01_good", FIGURE)
    write_notebook(study, "02_bad", "figure = 1", 'raise RuntimeError("the {name} broke")')
    write_notebook(study, "03_independent", "1")
    states, outcomes = run(tmp_path)
    assert states == ["done", "failed", "done"]
    assert "RuntimeError: the 02_bad broke" in outcomes[1].message
    failed = tmp_path / "run" / "02_bad.failed"
    assert (failed / EXECUTED).is_file() and (failed / PAGE).is_file()
    assert not (tmp_path / "run" / "02_bad").exists()
    states_now = {name: state for name, state, _ in status(load_profile("smoke"), tmp_path / "run")}
    assert states_now == {"01_good": "done", "02_bad": "failed", "03_independent": "done"}
    write_notebook(study, "02_bad", "1")
    assert run(tmp_path)[0] == ["kept", "done", "kept"]
    assert not failed.exists()


def test_a_dead_kernel_is_a_failure_like_another(study, tmp_path):
    write_notebook(study, "01_dies", "import os\nos._exit(1)")
    write_notebook(study, "02_goes_on", "1")
    states, outcomes = run(tmp_path)
    assert states == ["failed", "done"]
    assert "DeadKernelError" in outcomes[0].message
    assert (tmp_path / "run" / "01_dies.failed" / EXECUTED).is_file()


def test_each_record_is_read_once(study, tmp_path, monkeypatch):
    write_notebook(study, "01_first", "1")
    assert run(tmp_path)[0] == ["done"]
    read = []
    monkeypatch.setattr(
        module, "finished_record", lambda folder: read.append(folder.name) or finished_record(folder)
    )
    (state,) = module.states(load_profile("smoke"), tmp_path / "run")
    assert state.current and state.settings == {} and read == ["01_first"]


def test_only_the_shipped_profile_in_its_own_folder_is_published(tmp_path):
    embedded, place = load_profile("embedded"), (module.RUNS / "embedded").resolve()
    assert module.is_published(embedded, place, seed=0)
    assert not module.is_published(embedded, place, seed=1)
    assert not module.is_published(embedded, tmp_path, seed=0)
    assert not module.is_published(load_profile("smoke").model_copy(update={"name": "embedded"}), place, 0)


def test_bars_reach_the_terminal_and_not_the_page(study, tmp_path):
    write_notebook(
        study,
        "01_bars",
        "import sys, time\nfrom vaalign_lib.jobs import progress\n"
        "for _ in progress(range(4), 'count' + 'ing'):\n    time.sleep(0.15)",
        "print('a warning', file=sys.stderr)",
    )
    run(tmp_path)
    page = (tmp_path / "run" / "01_bars" / PAGE).read_text()
    assert "counting" not in page and "a warning" in page


def test_selection_names_what_exists(study):
    write_notebook(study, "01_first")
    write_notebook(study, "02_second")
    assert [book.name for book in module.select("02")] == ["02_second"]
    assert [book.name for book in module.select("02_second, 01")] == ["01_first", "02_second"]
    assert len(module.select(None)) == 2
    with pytest.raises(module.UsageError, match="no notebook '07'; there are 01_first, 02"):
        module.select("01,07")


def test_publishing_copies_only_what_changed(tmp_path):
    source = tmp_path / "run"
    (source / "figures").mkdir(parents=True)
    (source / "tables").mkdir()
    (source / "figures" / "a.png").write_bytes(b"1")
    (source / "tables" / "t.md").write_bytes(b"2")
    targets = (tmp_path / "figures", tmp_path / "results", tmp_path / "pages")
    assert len(publish(source, *targets)) == 2
    assert publish(source, *targets) == []
    (source / "figures" / "a.png").write_bytes(b"3")
    assert [path.name for path in publish(source, *targets)] == ["a.png"]


SCRIPT = """
import signal, sys
from pathlib import Path
from vaalign_lib.reproduce import cli, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
run.NOTEBOOKS = cli.NOTEBOOKS = Path(sys.argv[1])
sys.exit(cli.main(["reproduce", "--profile", "smoke", "--run-dir", sys.argv[2]]))
"""


def start_process(study, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(study), str(tmp_path / "run")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, seconds=240):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle_and_started_again(study, tmp_path, how):
    marker, go_on = tmp_path / "started", tmp_path / "go_on"
    slow = f"""
import time
from pathlib import Path
Path({str(marker)!r}).touch()
while not Path({str(go_on)!r}).exists():
    time.sleep(0.05)
"""
    write_notebook(study, "01_quick", FIGURE)
    write_notebook(study, "02_slow", FIGURE, slow)
    process = start_process(study, tmp_path)
    wait_for(marker)
    process.send_signal(how)
    _, told = process.communicate(timeout=240)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(how, -how)
    folder = tmp_path / "run"
    assert finished_record(folder / "01_quick") is not None
    assert not (folder / "02_slow").exists() and not (folder / "02_slow.failed").exists()
    assert "Traceback" not in told and "WARNING" not in told
    if how is not signal.SIGKILL:
        last = f"vaalign: {'terminated' if how is signal.SIGTERM else 'interrupted'}; what was finished"
        assert told.splitlines()[-1].startswith(last)
        assert not list(folder.glob(".02_slow*"))
    go_on.touch()
    again = start_process(study, tmp_path)
    _, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert "already done" in errors and "02_slow: done" in errors
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "01_quick",
        "02_slow",
        "report.html",
        "scoreboard.json",
    ]
    assert not list(folder.glob(".0*"))
    assert json.loads((folder / "02_slow" / "done.json").read_text())["files"]


def test_from_results_draws_what_can_be_drawn_and_takes_the_rest(study, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    write_notebook(study, "01_trains", FIGURE, "assert not (run.run_dir / 'results-only').exists()")
    write_notebook(study, "02_draws", FIGURE, "assert from_results == ('drawn' in str(run.run_dir))")
    path = study / "02_draws.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source += "\nfrom_results = True"  # as JupyterLab is to open it
    nbformat.write(notebook, path)
    assert run(tmp_path)[0] == ["done", "done"]
    drawn = {"profile_source": "smoke", "run_dir": tmp_path / "drawn", "from_results": True}
    assert [one.state for one in reproduce(load_profile("smoke"), **drawn)] == ["skipped", "done"]
    for name in ("01_trains", "02_draws"):
        publish(tmp_path / "run" / name, *(tmp_path / one for one in ("figures", "results", "pages")))
    (tmp_path / "drawn" / "results-only").mkdir()  # the first would fail if it ran
    assert [one.state for one in reproduce(load_profile("smoke"), **drawn)] == ["taken", "done"]
    for name in ("01_trains", "02_draws"):
        figure = f"figures/{name}_line.png"
        theirs, ours = tmp_path / "run" / name, tmp_path / "drawn" / name
        assert (ours / figure).read_bytes() == (theirs / figure).read_bytes()
    states = [state for _, state, _ in status(load_profile("smoke"), tmp_path / "drawn")]
    assert states == ["done", "done"]


def test_published_rows_of_other_profiles_belong_to_a_notebooks_inputs(study, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    write_notebook(study, "01_trains")
    write_notebook(study, "02_draws")
    notebook = nbformat.read(study / "02_draws.ipynb", as_version=4)
    notebook.cells[1].source += "\nfrom_results = False"
    nbformat.write(notebook, study / "02_draws.ipynb")

    def keys():
        smoke = load_profile("smoke")
        return [module.notebook_key(book, smoke, 0) for book in module.notebooks()]

    before = keys()
    for profile in ("smoke", "extended"):
        (tmp_path / "runs" / profile).mkdir(parents=True)
        (tmp_path / "runs" / profile / "runs.parquet").write_bytes(b"1")
        changed = [old != new for old, new in zip(before, keys(), strict=True)]
        assert changed == [False, profile == "extended"]
