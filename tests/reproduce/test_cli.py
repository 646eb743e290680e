"""The command line: wrong words end in one clear line and a code, never in a stack trace."""

import os
import subprocess
import sys

import pytest

from vaalign_lib.data.pairs import DataError
from vaalign_lib.reproduce import cli
from vaalign_lib.reproduce.cli import main
from vaalign_lib.reproduce.run import State, notebooks
from vaalign_lib.store import RESULTS, ROOT, locked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "--profile", "huge"], "vaalign: no profile 'huge': choose one of"),
        (["reproduce", "--profile", "smoke", "--only", "99"], "--only: no notebook '99'; there are 01"),
        (["reproduce", "--profile", "smoke", "--only", ","], "--only: no notebook ''; there are 01"),
        (
            ["reproduce", "--profile", "smoke", "--only", "03", "--set", "pair=x"],
            "--set: 03_ensemble_disagreement has no parameter 'pair'; it has pairs, backbone, evaluation",
        ),
        (
            ["reproduce", "--profile", "smoke", "--only", "01", "--set", "seed=3"],
            "--set: 01_bandit has no parameter 'seed'; it has none beside those with options",
        ),
        (["reproduce", "--from-results", "--profile", "smoke"], "--from-results: published are"),
        (["publish", "--profile", "smoke", "--seed", "1"], "--seed: only results of seed 0"),
        (["status", "--profile", "missing.yaml"], "vaalign: no profile 'missing.yaml'"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, words):
    assert main([*arguments, "--run-dir", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_wrong_key_in_a_profile(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndescription: d\nbandit: {draws: 100, many_draws: 20000, x: 1}\n")
    assert main(["reproduce", "--profile", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "bandit.x: unknown key; allowed here: draws, many_draws" in message
    assert "theorems: missing" in message


@pytest.mark.parametrize("profile", ["extends: smoke\nname: mine\nreference: {width: 17}\n", "a: 1\na: 2"])
def test_every_command_refuses_the_same_by_the_same_check(tmp_path, capsys, profile):
    file = tmp_path / "mine.yaml"
    file.write_text(profile)
    said = set()
    for command in ("reproduce", "plan", "status", "report", "publish"):
        assert main([command, "--profile", str(file), "--run-dir", str(tmp_path / "run")]) == 2
        said.add(capsys.readouterr().err)
    assert len(said) == 1 and not (tmp_path / "run").exists()


def test_a_busy_run_folder(tmp_path, capsys):
    with locked(tmp_path):
        assert main(["reproduce", "--profile", "smoke", "--run-dir", str(tmp_path)]) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_status_and_report_of_an_empty_folder(tmp_path, capsys):
    options = ["--profile", "smoke", "--run-dir", str(tmp_path)]
    assert main(["status", *options]) == 0
    shown = capsys.readouterr().out
    assert "01_bandit" in shown and "missing" in shown
    assert main(["report", *options]) == 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "scoreboard.json").is_file()


def test_publishing_data_that_cannot_be_read_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise DataError("pairs.jsonl:3: no prompt")

    monkeypatch.setattr("vaalign_lib.experiments.results.publish_runs", refuse)
    assert main(["publish", "--profile", "smoke", "--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "vaalign: pairs.jsonl:3: no prompt\n"


def test_drawing_from_results_keeps_away_from_trained_runs(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    assert main(["reproduce", "--from-results", "--run-dir", str(tmp_path)]) == 2
    assert "holds runs that were trained" in capsys.readouterr().err


def test_publishing_an_empty_folder_changes_nothing(tmp_path, capsys):
    assert main(["publish", "--profile", "smoke", "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 of ")
    assert not list(RESULTS.glob("runs/smoke*"))


@pytest.mark.parametrize(
    "arguments", [[], ["reproduce", "--workers", "-1"], ["fly"], ["reproduce", "--set", "pairs"]]
)
def test_unparsable_arguments(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_status_and_refusals_need_no_torch(tmp_path):
    """Imports of seconds would be most of what these take."""
    program = (
        "import sys; from vaalign_lib.reproduce.cli import main; "
        f"codes = [main(['status', '--profile', name, '--run-dir', {str(tmp_path)!r}]) "
        "for name in ('smoke', 'none')]; "
        "sys.exit(codes != [0, 2] or bool({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_only_publishing_writes_into_the_tree(tmp_path, capsys, monkeypatch):
    """What is finished is copied when `publish` is said, and by nothing else."""
    finished, written = notebooks()[:2], []
    states = [State(one, {}, one in finished) for one in notebooks()]
    monkeypatch.setattr(cli, "states", lambda *_: states)
    monkeypatch.setattr(cli, "publish", lambda folder: [cli.ROOT / "figures" / f"{folder.name}.png"])
    monkeypatch.setattr(cli, "write_into_page", written.append)
    options = ["--profile", "smoke", "--run-dir", str(tmp_path)]
    assert main(["publish", *options]) == 0 and not written
    monkeypatch.setattr(cli, "is_published", lambda *_: True)
    assert main(["publish", *options]) == 0 and len(written) == 1
    shown = capsys.readouterr().out
    assert f"figures/{finished[1].name}.png" in shown and "of 2 finished notebooks" in shown
    called = {name for name in cli._reproduce.__code__.co_names if "publish" in name or "page" in name}
    assert not called
