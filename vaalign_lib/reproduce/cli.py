"""The `vaalign` command: reproduce, plan, publish, report, status."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from vaalign_lib.papers.printed import UnknownRuleError
from vaalign_lib.profiles import PUBLISHED_PROFILE, Profile, ProfileError, Study, load_profile
from vaalign_lib.reproduce.report import published_rows, write_into_readme, write_report
from vaalign_lib.reproduce.run import (
    UnknownNotebookError,
    UnknownParameterError,
    publishes,
    reproduce,
    select,
    status,
)
from vaalign_lib.reproduce.run_folder import RunFolderError, check, opened
from vaalign_lib.store import NOTEBOOKS, RUNS, PlanError, RunDirectoryBusyError, RunStore, content_key

_WITH_MODELS = ("03_ensemble_disagreement", "04_ppo_runs", "05_statistics")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for library in ("papermill", "traitlets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if not NOTEBOOKS.is_dir():
            raise FileNotFoundError(
                f"no notebooks at {NOTEBOOKS}: vaalign works in a checkout of the project"
            )
        profile = load_profile(options.profile)
        run_dir = _run_dir(options, profile)
        return int(options.command(options, profile, run_dir))
    except (
        PlanError,
        ProfileError,
        RunDirectoryBusyError,
        RunFolderError,
        UnknownNotebookError,
        UnknownParameterError,
        UnknownRuleError,
        _UsageError,
        ValidationError,  # of the rules
        OSError,
    ) as error:
        print(f"vaalign: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        terminated = isinstance(stopped, _Terminated)
        print(
            f"vaalign: {'terminated' if terminated else 'interrupted'}; what was finished is kept, "
            "run it again to go on",
            file=sys.stderr,
        )
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """The process was told to end."""


def _terminate(*_: object) -> None:
    """End like an interruption, with everything tidied up."""
    raise _Terminated


class _UsageError(ValueError):
    """Options that do not go together."""


def _one_line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vaalign: {message}; see {self.prog} --help\n")


def _reproduce(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    names = [name for name, _ in options.set]
    if twice := {name for name in names if names.count(name) > 1}:
        raise _UsageError(f"--set: {', '.join(sorted(twice))} twice; say it once")
    if options.from_results and (profile.name != PUBLISHED_PROFILE or options.seed or options.set):
        raise _UsageError(
            f"--from-results: published are the results of profile {PUBLISHED_PROFILE} with seed 0 and "
            "its own parameters; leave out --profile, --seed and --set"
        )
    if options.from_results and (run_dir / "store").exists():
        raise _UsageError(f"--from-results: {run_dir} holds runs that were trained; choose another --run-dir")
    _before_starting(options, profile, run_dir)
    if options.dask:
        from vaalign_lib import jobs  # here, for it takes seconds to import

        jobs.connected(options.dask).close()
    outcomes = reproduce(
        profile,
        profile_source=_source(options.profile),
        only=options.only,
        workers=options.dask or options.workers,
        run_dir=run_dir,
        seed=options.seed,
        force=options.force,
        settings=dict(options.set),
        from_results=options.from_results,
    )
    _report(options, profile, run_dir)
    if publishes(profile, run_dir, options.seed) and not options.set:
        write_into_readme(published_rows())
    return 1 if any(outcome.state in ("failed", "skipped") for outcome in outcomes) else 0


def _before_starting(options: argparse.Namespace, profile: Profile, run_dir: Path) -> None:
    """Say what real models and paid judges would do, and what is missing for it, before they are used."""
    from vaalign_lib.reproduce import plan  # here, for it takes seconds to import

    if options.set:  # with reward models of one's own no policy is trained
        plan.check_own(dict(options.set))
    if options.from_results or options.set:
        return
    if any(notebook.name in _WITH_MODELS for notebook in select(options.only)):
        store = RunStore(run_dir / "store")
        if text := plan.checked_plan(Study(store, profile, options.seed), _workers(options)):
            print(text)


def _plan(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    from vaalign_lib.reproduce import plan  # here, for it takes seconds to import

    store = RunStore(run_dir / "store")
    text, lacks = plan.complete_plan(Study(store, profile, options.seed), _workers(options))
    print(text)
    if lacks:
        print(f"vaalign: this is missing: {'; '.join(lacks)}", file=sys.stderr)
    return 1 if lacks else 0


def _workers(options: argparse.Namespace) -> int:
    from vaalign_lib.jobs import default_workers  # here, for it takes seconds to import

    return int(options.workers) or default_workers()


def _publish(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    from vaalign_lib.experiments.conditions import plan
    from vaalign_lib.experiments.results import PUBLISHED, publish_runs

    if options.seed:
        raise _UsageError("--seed: only results of seed 0 are published")
    runs = plan(profile.policies.runs)
    with opened(run_dir):
        names = publish_runs(Study(RunStore(run_dir / "store"), profile, options.seed), runs)
    for name in names:
        print(f"  {name}")
    print(f"{len(names)} of {len(runs)} stacks are new or changed in {PUBLISHED / profile.name}")
    return 0


def _report(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    page = write_report(profile, run_dir, options.seed)
    print(f"report: {page}")
    return 0


def _status(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    rows = status(profile, run_dir, options.seed)
    width = max((len(name) for name, *_ in rows), default=0)
    print(f"profile {profile.name}, run folder {run_dir}")
    for name, state, note in rows:
        print(f"  {name:<{width}}  {state:<8}  {note}".rstrip())
    return 0


def _run_dir(options: argparse.Namespace, profile: Profile) -> Path:
    """Return the run folder; runs with parameters of their own get one of their own."""
    own = getattr(options, "set", [])
    name = f"{profile.name}-{content_key(settings=dict(own))[:8]}" if own else profile.name
    if getattr(options, "from_results", False):
        name = f"{profile.name}-from-results"
    folder = options.run_dir or RUNS / name
    tells = options.command in (_plan, _status) and not options.run_dir
    if options.command is not _reproduce and not tells and not folder.exists():
        raise RunFolderError(f"--run-dir: there is no {folder}; `vaalign reproduce` makes run folders")
    return check(folder)


def _setting(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    if not Path(value).exists() and value.startswith(("/", "./", "../", "~")):
        raise argparse.ArgumentTypeError(f"{name}: there is no {value}")
    exists = (Path(value).exists() and "/" in value) or Path(value).is_file()
    return name, str(Path(value).resolve()) if exists else value


def _source(profile: str) -> str:
    """Return the profile as the notebooks are to find it, from another working directory."""
    return str(Path(profile).resolve()) if profile.endswith((".yaml", ".yml")) else profile


def _path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected the name of a folder, got {text!r}")
    return Path(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _address(text: str) -> str:
    from vaalign_lib.jobs import ADDRESS

    if not ADDRESS.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"expected the address of a dask scheduler such as tcp://host:8786, got {text!r}"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vaalign", description="Reproduce the study: every figure and table of the papers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument(
        "--profile",
        default="embedded",
        help="embedded (default), extended, smoke, paper, or the path of a YAML file",
    )
    common.add_argument("--run-dir", metavar="DIR", type=_path, help="run folder (default: runs/<profile>)")
    common.add_argument("--seed", type=_whole, default=0, help="of the whole study (default: 0)")

    run = commands.add_parser(
        "reproduce", parents=[common], help="execute the notebooks and write the report"
    )
    run.add_argument("--only", metavar="01,02", help="numbers or names of notebooks (default: all)")
    run.add_argument(
        "--workers", type=_whole, default=0, help="processes for long work (default: one per core)"
    )
    run.add_argument(
        "--dask",
        metavar="ADDRESS",
        type=_address,
        help="train the policies on a dask.distributed cluster, such as tcp://host:8786; its workers "
        "must see the run folder under the same path",
    )
    run.add_argument(
        "--force", action="store_true", help="run notebooks also if they ran before with the same inputs"
    )
    run.add_argument(
        "--set",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="a further parameter of the selected notebooks, such as pairs=FILE; goes to a run folder "
        "of its own and is never published",
    )
    run.add_argument(
        "--from-results",
        action="store_true",
        help="train nothing: draw from what is published in data/results, in a run folder of its own",
    )
    run.set_defaults(command=_reproduce)
    publication = commands.add_parser(
        "publish",
        parents=[common],
        help="copy finished stacks of policies, a row per policy, to data/results/runs",
    )
    publication.set_defaults(command=_publish)
    planning = commands.add_parser(
        "plan",
        parents=[common],
        help="show what a reproduction would train: policies, steps, paid calls, time, memory, disk; and "
        "what is missing for it",
    )
    planning.add_argument("--workers", type=_whole, default=0, help="stacks at a time")
    planning.set_defaults(command=_plan)
    report = commands.add_parser(
        "report", parents=[common], help="write report.html and scoreboard.json from what is there"
    )
    report.set_defaults(command=_report)
    state = commands.add_parser(
        "status", parents=[common], help="show what is done, what is missing, and how long it took"
    )
    state.set_defaults(command=_status)
    return parser


if __name__ == "__main__":
    sys.exit(main())
