"""What a notebook writes: the same bytes for the same results, labelled, refused without a rule."""

import json

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from vaalign_lib.figures.style import canvas
from vaalign_lib.papers.printed import UnknownRuleError
from vaalign_lib.profiles import ProfileError
from vaalign_lib.reproduce.notebook import start
from vaalign_lib.statistics.returns import Ratio


def write_all(folder):
    run = start("01_bandit", profile="smoke", run_dir=folder)
    figure = Figure()
    figure.subplots().plot(run.rng("x").normal(size=5))
    run.save_figure(figure, "line", item="Figure 2", caption="A line.")
    table = pd.DataFrame({"name": ["a", "b"], "value": [1 / 3, 2e-17]})
    run.save_table(table, "table", item="Figure 2", caption="Numbers.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_the_same_results_give_the_same_bytes(tmp_path):
    first, second = write_all(tmp_path / "1"), write_all(tmp_path / "2")
    assert first == second
    names = {path.name for path in first}
    assert names == {"line.png", "line.pdf", "table.parquet", "table.md", "findings.json"}


def test_figures_do_not_follow_a_matplotlibrc(tmp_path):
    plain = write_all(tmp_path / "1")
    dark = {"axes.facecolor": "black", "text.color": "white", "savefig.bbox": "tight"}
    with mpl.rc_context(dark | {"font.size": 30, "lines.linewidth": 9, "figure.dpi": 300}):
        assert write_all(tmp_path / "2") == plain
    with mpl.rc_context(dark), canvas(4, 3) as (figure, _):
        assert mpl.rcParams["text.color"] == "black"
        assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)


def test_files_say_what_they_are(tmp_path):
    files = {path.name: content for path, content in write_all(tmp_path).items()}
    assert b"profile smoke" in files["line.png"] and b"Figure 2" in files["line.png"]
    assert files["table.md"].decode().startswith("**Figure 2.** Numbers. Profile: smoke.")
    table = pq.read_table(next(tmp_path.rglob("table.parquet")))
    assert table.schema.metadata[b"notebook"] == b"01_bandit"
    assert table.column("value").to_pylist() == [0.3333333333, 2e-17]


def test_random_numbers_depend_on_seed_notebook_and_name(tmp_path):
    def draw(name, part, seed):
        return start(name, profile="smoke", run_dir=tmp_path, seed=seed).rng(part).normal()

    values = [draw(*case) for case in (("a", "x", 0), ("a", "x", 1), ("a", "y", 0), ("b", "x", 0))]
    assert len(set(values)) == 4 and values[0] == draw("a", "x", 0)


def test_findings_need_a_rule_and_numpy_booleans_are_fine(tmp_path):
    run = start("01_bandit", profile="smoke", run_dir=tmp_path)
    assert run.finding("figure3.frequency", "no", holds=np.bool_(False)) == "not consistent"
    with pytest.raises(UnknownRuleError):
        run.finding("figure3.colour", "blue", holds=True)
    board = run.scoreboard()
    assert "not consistent" in set(board["verdict"]) and "not yet" in set(board["verdict"])


def test_a_ratio_that_is_not_above_the_noise_is_not_determinable(tmp_path):
    run = start("05_statistics", profile="smoke", run_dir=tmp_path)
    for floored, expected in ((0.0, "found here"), (0.5, "not determinable")):
        ratio = Ratio(2.0, 1.5, 2.5, 80, np.ones(3), floored)
        assert run.finding("table1.variance_ratios", f"{ratio}", estimate=ratio) == expected
    (kept,) = tmp_path.rglob("findings.json")
    (found,) = json.loads(kept.read_text())["findings"]
    assert found["clear"] is False and found["low"] == 1.5


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"profile": "smoek"}, "no profile 'smoek'"),
        ({"profile": "smoke", "seed": -1}, "seed: expected a whole number"),
        ({"profile": "smoke", "seed": 0.5}, "seed: expected a whole number"),
        ({"profile": "smoke", "workers": -2}, "workers: expected a whole number"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, parameters, words):
    with pytest.raises((ProfileError, ValueError), match=words):
        start("01_bandit", run_dir=tmp_path, **parameters)
