"""Every row of tests/bad_input is refused: in one clear line, quickly, offline, before anything starts.

A row says `case`, then `call` (an expression, which knows np, pd, torch, Path, folder, prepared and every
dotted name of vaalign_lib) or `command` (arguments of `vaalign`), what lies in the folder before
(`profile`, merged over the smoke profile; `files`; `prepare`, a function of tests/bad_input/prepare.py),
and what comes of it (`error`, ValueError unless said; `exit`, 2 unless said; `says`, words of the
message). In commands, profiles and files `{folder}` and `{prepared}` stand for their values.
"""

import contextlib
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import vaalign_lib.reproduce.plan  # which the command imports, before any clock runs
from tests.bad_input import prepare
from vaalign_lib.reproduce import cli
from vaalign_lib.store import ROOT

SECONDS = 10  # that a refusal may take
LONGEST = 3000  # characters of a message
AT_LEAST = 300  # rows in all
KEYS = {"case", "call", "command", "profile", "files", "prepare", "error", "exit", "says"}
AS_PROCESSES = ("no such profile", "no policies", "several wrong keys at once", "an unknown command")

ROWS = {
    f"{path.stem}: {row['case']}": row
    for path in sorted(Path(prepare.__file__).parent.glob("*.yaml"))
    for row in yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
}


class TooSlow(BaseException):
    """No refusal in time; no `except Exception` may hide it."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    connect, find = socket.socket.connect, socket.getaddrinfo

    def near(host):
        return str(host) in ("localhost", "127.0.0.1", "::1", "None")

    def checked_connect(self, address):
        if isinstance(address, tuple) and not near(address[0]):
            raise ConnectionRefusedError(f"a test asked for {address[0]}")
        return connect(self, address)

    def checked_find(host, *args, **kwargs):
        if not near(host):
            raise socket.gaierror(f"a test asked for {host}")
        return find(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", checked_connect)
    monkeypatch.setattr(socket, "getaddrinfo", checked_find)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return the folder with the files of a function of prepare.py, which runs once."""
    folders = {}

    def folder_of(function):
        if function not in folders:
            folders[function] = tmp_path_factory.mktemp(function.__name__)
            function(folders[function])
        return folders[function]

    return folder_of


@contextlib.contextmanager
def prepared(row, folder, made):
    """Fill a row's folder; yield a function that puts the folder into a text, and what was prepared."""
    with contextlib.ExitStack() as stack:
        value = None
        if name := row.get("prepare"):
            function = getattr(prepare, name)
            if inspect.isgeneratorfunction(function):
                value = stack.enter_context(contextlib.contextmanager(function)(folder))
            else:
                shutil.copytree(made(function), folder, dirs_exist_ok=True)

        def filled(text):
            return text.replace("{folder}", str(folder)).replace("{prepared}", str(value))

        for file, content in row.get("files", {}).items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else filled(content).encode())
        if "profile" in row:
            content = {"extends": "smoke", "name": "mine", "description": "bad"} | row["profile"]
            text = yaml.safe_dump(content, allow_unicode=True)
            (folder / "mine.yaml").write_text(filled(text), encoding="utf-8")
        yield filled, value


@contextlib.contextmanager
def in_time():
    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except TooSlow:
        pytest.fail(f"not refused in {SECONDS} seconds")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def import_named(expression):
    for dotted in re.findall(r"\bvaalign_lib(?:\.\w+)+", expression):
        pkgutil.resolve_name(dotted)  # imports the modules on the way


def evaluated(expression, **names):
    known = {"vaalign_lib": vaalign_lib, "np": np, "pd": pd, "torch": torch, "Path": Path}
    return eval(expression, known | names)


def message_of_call(row, folder, value):
    import_named(f"{row['call']} {row.get('error')}")
    expected = evaluated(row.get("error", "ValueError"))
    try:
        with in_time():
            result = evaluated(row["call"], folder=folder, prepared=value)
    except Exception as error:
        if not isinstance(error, expected):
            raise AssertionError(
                f"expected {expected.__name__}, got {type(error).__name__}: {error}"
            ) from error
        return str(error)
    pytest.fail(f"accepted: gave {result!r:.200}")


def message_of_command(row, filled, capfd):
    arguments = [filled(word) for word in shlex.split(row["command"])]
    try:
        with in_time():
            code = cli.main(arguments)
    except SystemExit as stopped:  # of argparse
        code = stopped.code
    out, err = capfd.readouterr()
    return checked_message(row, code, out, err)


def checked_message(row, code, out, err):
    expected = row.get("exit", 2)
    assert code == expected, f"exit {code}, not {expected}; stdout: {out[-300:]!r}; stderr: {err!r}"
    lines = err.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr, not one:\n{err}"
    assert lines[0].startswith("vaalign: "), f"does not begin with 'vaalign: ': {lines[0]}"
    assert "Traceback" not in err
    return lines[0]


def check_words(row, message):
    assert len(message) < LONGEST, f"{len(message)} characters: {message[:LONGEST]}"
    absent = [word for word in row["says"] if str(word).lower() not in message.lower()]
    assert not absent, f"not said: {absent}; said: {message}"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_bad_input_is_refused(row, tmp_path, monkeypatch, capfd, made):
    monkeypatch.setattr(cli, "RUNS", tmp_path / "runs")
    with prepared(row, tmp_path, made) as (filled, value):
        if "call" in row:
            message = message_of_call(row, tmp_path, value)
        else:
            message = message_of_command(row, filled, capfd)
    check_words(row, message)


def test_rows_are_well_formed():
    cases = Counter(
        f"{path.stem}: {case}"
        for path in Path(prepare.__file__).parent.glob("*.yaml")
        for case in re.findall(r"^- case: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert [case for case, count in cases.items() if count > 1] == []
    assert sum(cases.values()) == len(ROWS) >= AT_LEAST
    for name, row in ROWS.items():
        assert set(row) <= KEYS, f"{name}: unknown {set(row) - KEYS}"
        assert ("call" in row) != ("command" in row), f"{name}: either a call or a command"
        assert row.get("says"), f"{name}: says nothing"


def test_rows_as_processes(tmp_path, made):
    """Start all at once, for interpreters start slowly."""
    started = []
    for case in AS_PROCESSES:
        row, folder = ROWS[f"profiles: {case}"], tmp_path / str(len(started))
        folder.mkdir()
        with prepared(row, folder, made) as (filled, _):
            command = [sys.executable, "-m", "vaalign_lib.reproduce.cli"]
            command += [filled(word) for word in shlex.split(row["command"])]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            started.append((row, subprocess.Popen(command, env=environment, **pipes)))
    for row, process in started:
        out, err = process.communicate(timeout=120)
        check_words(row, checked_message(row, process.returncode, out, err))
