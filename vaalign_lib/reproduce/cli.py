"""The `vaalign` command: reproduce, plan, check, publish, report, status; check-reward, compare."""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from vaalign_lib.papers.printed import UnknownRuleError
from vaalign_lib.profiles import LARGEST_SEED, PUBLISHED_PROFILE, Profile, ProfileError, Study, load_profile
from vaalign_lib.reproduce.report import published_parts, write_into_page, write_report
from vaalign_lib.reproduce.run import PEOPLE, is_published, publish, reproduce, select, states, status
from vaalign_lib.reproduce.run_folder import UsageError, check, opened
from vaalign_lib.store import NOTEBOOKS, ROOT, RUNS, PlanError, RunDirectoryBusyError, RunStore, content_key

_WITH_MODELS = ("03_ensemble_disagreement", "04_ppo_runs", "05_statistics", PEOPLE)
_TOLD = (
    PlanError,
    ProfileError,
    RunDirectoryBusyError,
    UnknownRuleError,
    UsageError,
    ValidationError,
    OSError,
)


class _Terminated(KeyboardInterrupt):
    """The process was told to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for library in ("papermill", "traitlets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if not NOTEBOOKS.is_dir():
            raise UsageError(f"no notebooks at {NOTEBOOKS}: vaalign works in a checkout of the project")
        if options.command in _ON_MODELS:
            return int(options.command(options))
        profile = load_profile(options.profile)
        return int(options.command(options, profile, _run_dir(options, profile)))
    except _TOLD as error:
        lines = [line.strip() for line in str(error).splitlines()]
        print(f"vaalign: {'; '.join(filter(None, lines))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        terminated = isinstance(stopped, _Terminated)
        how = "terminated" if terminated else "interrupted"
        print(f"vaalign: {how}; what was finished is kept, run it again to go on", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _terminate(*_: object) -> None:
    """End like an interruption, with everything tidied up."""
    raise _Terminated


# --- the commands -------------------------------------------------------------------------------------
# What takes seconds to import is imported where it is needed.


def _reproduce(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    settings = dict(options.set)
    if twice := {name for name, _ in options.set if [one for one, _ in options.set].count(name) > 1}:
        raise UsageError(f"--set: {', '.join(sorted(twice))} twice; say it once")
    if options.from_results and (profile.name != PUBLISHED_PROFILE or options.seed or settings):
        raise UsageError(
            f"--from-results: published are the results of profile {PUBLISHED_PROFILE} with seed 0 and "
            "its own parameters; leave out --profile, --seed and --set"
        )
    if options.from_results and (run_dir / "store").exists():
        raise UsageError(f"--from-results: {run_dir} holds runs that were trained; choose another --run-dir")
    _before_starting(options, profile, run_dir)
    yaml_file = options.profile.endswith((".yaml", ".yml"))
    outcomes = reproduce(
        profile,
        profile_source=str(Path(options.profile).resolve()) if yaml_file else options.profile,
        only=options.only,
        workers=options.dask or options.workers,
        run_dir=run_dir,
        seed=options.seed,
        force=options.force,
        settings=settings,
        from_results=options.from_results,
    )
    _report(options, profile, run_dir)
    return 1 if any(outcome.state in ("failed", "skipped") for outcome in outcomes) else 0


def _before_starting(options: argparse.Namespace, profile: Profile, run_dir: Path) -> None:
    """Say what real models and paid judges would do, and what is missing for it, before they are used."""
    from vaalign_lib.reproduce import plan

    settings = dict(options.set)
    trains = profile.raters is None or settings.pop("train", "") == "True"
    if settings:  # with reward models of one's own no policy is trained
        plan.check_own(settings)
    elif not options.from_results and any(one.name in _WITH_MODELS for one in select(options.only, profile)):
        study = _study(options, profile, run_dir)
        if (text := plan.checked_plan(study, _workers(options))) and trains:
            print(text)
    if options.dask:
        from vaalign_lib import jobs

        jobs.connected(options.dask).close()


def _plan(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    from vaalign_lib.reproduce import plan

    text, lacks = plan.complete_plan(_study(options, profile, run_dir), _workers(options))
    print(text)
    if lacks:
        print(f"vaalign: this is missing: {'; '.join(lacks)}", file=sys.stderr)
    return 1 if lacks else 0


def _study(options: argparse.Namespace, profile: Profile, run_dir: Path) -> Study:
    return Study(RunStore(run_dir / "store"), profile, options.seed)


def _workers(options: argparse.Namespace) -> int:
    from vaalign_lib.jobs import default_workers

    return int(options.workers) or default_workers()


def _publish(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    from vaalign_lib.data.pairs import DataError
    from vaalign_lib.experiments.conditions import plan
    from vaalign_lib.experiments.results import PUBLISHED, publish_runs

    if options.seed:
        raise UsageError("--seed: only results of seed 0 are published")
    runs = plan(profile.policies.runs)
    if profile.raters is not None:
        from vaalign_lib.experiments import people_policies

        with opened(run_dir):
            tables = people_policies.publish(_study(options, profile, run_dir))
        print(f"{people_policies.COMMITTED}: {', '.join(tables)}")
        return 0
    with opened(run_dir):
        try:
            whole = is_published(profile, run_dir, options.seed)
            names = publish_runs(_study(options, profile, run_dir), runs, whole=whole)
        except DataError as error:
            raise PlanError(str(error)) from None
        done = [one.notebook.name for one in states(profile, run_dir) if one.current and not one.settings]
        files = []
        if whole:
            files = [path for name in done for path in publish(run_dir / name)]
            write_into_page(published_parts())
    for name in (*names, *(path.relative_to(ROOT) for path in files)):
        print(f"  {name}")
    print(
        f"{len(names)} of {len(runs)} stacks are new or changed in {PUBLISHED / profile.name}; "
        f"{len(files)} figures, tables, findings and pages of {len(done)} finished notebooks"
    )
    return 0


def _check(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    from vaalign_lib.reproduce.check import compared, in_words

    with opened(run_dir):
        outcome = compared(states(profile, run_dir, options.seed), run_dir)
        print(in_words(outcome))
        if (outcome["profile"], outcome["seed"]) == (profile.name, options.seed):
            return _report(options, profile, run_dir) or int(not outcome["as_published"])
        print(f"report: as it was, for it is of --profile {outcome['profile']} --seed {outcome['seed']}")
    return int(not outcome["as_published"])


def _report(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    print(f"report: {write_report(profile, run_dir, options.seed)}")
    return 0


def _status(options: argparse.Namespace, profile: Profile, run_dir: Path) -> int:
    rows = status(profile, run_dir, options.seed)
    width = max((len(name) for name, *_ in rows), default=0)
    print(f"profile {profile.name}, run folder {run_dir}")
    for name, state, note in rows:
        print(f"  {name:<{width}}  {state:<8}  {note}".rstrip())
    return 0


def _check_reward(options: argparse.Namespace) -> int:
    """Ask reward models of one's own what people trip over."""
    from vaalign_lib.experiments.reward_check import RULES, check_rewards
    from vaalign_lib.reproduce.execute import write_answer

    sources = options.pairs, options.ratings, options.rules or RULES
    with _told():
        found = check_rewards(options.folders, *sources, options.max_length, options.limit)
    folder = options.out or RUNS / "check-reward" / options.folders[0].resolve().name
    files = [*found.write(folder), write_answer(folder / "check.md")]
    for row in found.rows[found.rows["verdict"].isin(("failed", "warned"))].to_dict("records"):
        print(f"  {row['verdict']}: {row['rule']}, {row['model']}: {row['found']}")
    print(f"{'passed' if found.passed else 'failed'}: {found.in_words}; {', '.join(map(str, files))}")
    return int(not found.passed)


def _compare(options: argparse.Namespace) -> int:
    """Train policies of several methods on models of one's own, and say what came of it."""
    from vaalign_lib.experiments.compare import read_plan, run_plan
    from vaalign_lib.reproduce.execute import write_answer

    logging.getLogger("vaalign_lib.experiments.compare").setLevel(logging.INFO)
    plan = read_plan(options.file)
    folder = options.out or RUNS / "compare" / options.file.stem
    with _told():
        answer = run_plan(plan, folder)
    files = [*answer.write(folder), write_answer(folder / "answer.md", folder / "answer.png")]
    print(f"{answer.text}\n{', '.join(map(str, files))}")
    return 0


@contextmanager
def _told() -> Iterator[None]:
    """Tell in a line what is wrong with files, models or settings of one's own."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _run_dir(options: argparse.Namespace, profile: Profile) -> Path:
    """Return the run folder; runs with parameters of their own get one of their own."""
    name = profile.name
    if own := getattr(options, "set", []):
        name += f"-{content_key(settings=dict(own))[:8]}"
    if getattr(options, "from_results", False):
        name = f"{profile.name}-from-results"
    folder = options.run_dir or RUNS / name
    makes = options.command is _reproduce or (options.command in (_plan, _status) and not options.run_dir)
    if not makes and not folder.exists():
        raise UsageError(f"--run-dir: there is no {folder}; `vaalign reproduce` makes run folders")
    return check(folder)


# --- the command line ---------------------------------------------------------------------------------


def _matching(pattern: str, expected: str, kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return a reader of an option's value, which must match a pattern."""

    def read(text: str) -> Any:
        if not re.fullmatch(pattern, text, re.DOTALL):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return kind(text)

    return read


def _address(text: str) -> Any:
    from vaalign_lib.jobs import ADDRESS

    return _matching(ADDRESS.pattern, "the address of a dask scheduler such as tcp://host:8786")(text)


def _setting(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    path = Path(value)
    if not value or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    if max(map(len, path.parts), default=0) > 255:
        raise argparse.ArgumentTypeError(f"{name}: longer than any file's name may be")
    if not path.exists() and value.startswith(("/", "./", "../", "~")):
        raise argparse.ArgumentTypeError(f"{name}: there is no {value}")
    return name, str(path.resolve()) if path.is_file() or (path.exists() and "/" in value) else value


def _seed(text: str) -> int:
    if (seed := _WHOLE(text)) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"expected a whole number of at most {LARGEST_SEED}, got {text}")
    return int(seed)


def _count(text: str) -> int:
    return int(_matching(r"[1-9]\d*", "a whole number of at least 1", int)(text))


_WHOLE = _matching(r"\d+", "a whole number of at least 0", int)
_FOLDER = _matching(r"[^\0]*[^\0\s][^\0]*", "the name of a folder", Path)
_FLAG = {"action": "store_true"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "--profile": {
        "default": PUBLISHED_PROFILE,
        "help": "embedded (default), extended, smoke, paper, or a YAML file",
    },
    "--run-dir": {"metavar": "DIR", "type": _FOLDER, "help": "run folder (default: runs/<profile>)"},
    "run_dir": {
        "metavar": "RUN",
        "nargs": "?",
        "type": _FOLDER,
        "help": "run folder (default: runs/<profile>)",
    },
    "--seed": {"type": _seed, "default": 0, "help": "of the whole study (default: 0)"},
    "--only": {"metavar": "01,02", "help": "numbers or names of notebooks (default: all)"},
    "--workers": {"type": _WHOLE, "default": 0, "help": "stacks at a time (default: one per core)"},
    "--dask": {"metavar": "ADDRESS", "type": _address, "help": "train on a cluster, as tcp://host:8786"},
    "--force": _FLAG | {"help": "run notebooks also if they ran before with the same inputs"},
    "--set": {
        "metavar": "NAME=VALUE",
        "type": _setting,
        "action": "append",
        "default": [],
        "help": "a parameter of the notebooks, as pairs=FILE; goes to a run folder of its own, unpublished",
    },
    "folders": {"metavar": "FOLDER", "nargs": "+", "type": _FOLDER, "help": "reward model, or each member's"},
    "file": {"metavar": "FILE", "type": _FOLDER, "help": "models, prompts, methods and sizes, in YAML"},
    "--pairs": {"metavar": "FILE", "help": "labelled pairs, for accuracy (a file, or a data set of the hub)"},
    "--ratings": {"metavar": "FILE", "help": "responses rated by several people each"},
    "--rules": {"metavar": "FILE", "type": _FOLDER, "help": "in place of data/reward_rules.yaml"},
    "--out": {"metavar": "DIR", "type": _FOLDER, "help": "where results go (default: in runs/<command>)"},
    "--max-length": {"type": _count, "default": 4096, "help": "tokens that are read at most (4096)"},
    "--limit": {"type": _count, "default": 500, "help": "pairs and rated responses at most (500)"},
    "--from-results": _FLAG | {"help": "train nothing: draw from data/results, in a run folder of its own"},
}
_OF_RUNS = ["--only", "--workers", "--dask", "--force", "--set", "--from-results"]
_COMMANDS = {  # what it does, its options beside the first three
    _reproduce: ("execute the notebooks and write the report", _OF_RUNS),
    _check: (
        "compare a finished run, number by number, with data/results; exit with 1 if it is not the same",
        [],
    ),
    _publish: ("copy what is finished to figures/, data/results/, pages/ and docs/findings.md", []),
    _plan: ("show what a reproduction would train, how long it takes, what is missing for it", ["--workers"]),
    _report: ("write report.html and scoreboard.json from what is there", []),
    _status: ("show what is done, what is missing, and how long it took", []),
}
_ON_MODELS = {  # of one's own: what it does, all its options
    _check_reward: (
        "ask a reward model what people trip over; exit with 1 if it fails a rule that stops",
        ["folders", "--pairs", "--ratings", "--rules", "--out", "--max-length", "--limit"],
    ),
    _compare: (
        "train policies by several methods as a file says, match their KL, and say what came of it",
        ["file", "--out"],
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vaalign: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vaalign",
        description="The study: every figure and table of the papers. And the method on models of your own.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, (help_text, options) in (_COMMANDS | _ON_MODELS).items():
        name = command.__name__.removeprefix("_").replace("_", "-")
        one = commands.add_parser(name, help=help_text)
        of_study = ("--profile", "run_dir" if command is _check else "--run-dir", "--seed")
        for option in (*of_study * (command in _COMMANDS), *options):
            one.add_argument(option, **_OPTIONS[option])
        one.set_defaults(command=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
