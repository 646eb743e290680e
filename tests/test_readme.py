"""README and docs: Python runs as it stands, commands parse, profiles load, links lead somewhere."""

import json
import math
import re
import shlex
import shutil
import subprocess
import tomllib

import dask
import distributed
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import t

from tests.experiments.test_paper_profile import checkpoints, data_files
from tests.papers.test_exhibits import resolve
from vaalign_lib.experiments import conditions
from vaalign_lib.experiments.compare import read_plan
from vaalign_lib.profiles import available_profiles, load_profile
from vaalign_lib.reproduce.cli import _parser, main
from vaalign_lib.reproduce.report import FINDINGS_PAGE, settings
from vaalign_lib.store import RESULTS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}
EVERYTHING = "\n".join(PAGES.values())
FINDINGS = PAGES["findings.md"]


def blocks(text, *languages):
    """Return what is fenced as one of these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, flags=re.M | re.S)


CODE = {name: "".join(blocks(text, "python")) for name, text in PAGES.items()}  # of a page together
SHELL = [line for block in blocks(EVERYTHING, "sh") for line in block.splitlines()]
YAML = {block.partition("\n")[0]: block for block in blocks(EVERYTHING, "yaml")}
NOT_RUN_HERE = {"dask", "accelerate", "openssl", "export", "source"}  # servers, GPUs, and the shell's own


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150
    linked = set(re.findall(r"\(docs/([\w-]+\.md)", README))
    assert linked == {path.name for path in ROOT.glob("docs/*.md")}


def test_every_block_is_tested():
    languages = re.findall(r"^```(.+)$", EVERYTHING, flags=re.M)
    assert set(languages) <= {"python", "sh", "yaml"}
    assert list(YAML) == [
        "# /shared/dask.yaml",
        "# compare.yaml: vaalign compare compare.yaml",
        "# half.yaml: Qwen2.5-0.5B, adapters, one GPU",  # tests/reproduce/test_gpu_recipe.py
        "# few.yaml: vaalign plan --profile few.yaml",  # tests/experiments/test_people_policies.py
        "# mine.yaml: vaalign plan --profile mine.yaml",
    ]


# --- Python -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return the folder in which examples find what others have trained."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("page", [name for name, code in CODE.items() if code])
def test_python_examples_run(page, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "store").symlink_to(store)
    (tmp_path / "data").symlink_to(ROOT / "data")
    names = {}
    exec(compile(CODE[page], page, "exec"), names)
    if page == "train.md":
        glossary_is_complete(names["logs"]["vanilla"])


def metrics_of(heading):
    """Return the names in the first column of the glossary's table below a heading."""
    table = PAGES["metrics.md"].partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.M)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def glossary_is_complete(log):
    assert sorted(metrics_of("Logged in training")) == sorted(log.columns)


def test_the_glossary_has_what_is_published():
    tables = {
        name: pd.read_parquet(RESULTS / "runs" / "embedded" / f"{name}.parquet")
        for name in ("policies", "runs", "rewards", "curves", "looks")
    }
    assert sorted(metrics_of("Evaluated policies")) == sorted(set(tables["policies"]) - {"run", "policy"})
    lines = PAGES["results.md"].splitlines()
    for name in ("runs", "rewards"):
        (line,) = [one for one in lines if one.startswith(f"| `{name}` |")]
        assert set(tables[name]) <= set(re.findall(r"`(\w+)`", line))
    assert all(f"| `{name}` |" in PAGES["results.md"] for name in tables)


def test_the_example_comparison_is_valid(tmp_path):
    (tmp_path / "compare.yaml").write_text(YAML["# compare.yaml: vaalign compare compare.yaml"])
    (tmp_path / "my_prompts.jsonl").touch()
    for name in ("policy", "reward-model-0", "reward-model-1"):
        (tmp_path / "my" / name).mkdir(parents=True)
    plan = read_plan(tmp_path / "compare.yaml")
    assert {name: one.beta for name, one in plan.named.items()} == {"vanilla": 0.1, "variance_aware": 0.1}
    assert plan.rewards == [str(tmp_path / "my" / f"reward-model-{k}") for k in range(2)]


def test_dotted_names_lead_somewhere():
    names = set(re.findall(r"vaalign_lib(?:\.\w+)+", EVERYTHING))
    assert len(names) > 15
    for name in names:
        resolve(name)


# --- the shell ----------------------------------------------------------------------------------------


def test_shell_blocks_are_of_the_shell():
    for block in blocks(EVERYTHING, "sh"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def commands():
    """Yield the words of every command, without comments and what is set before it."""
    for line in SHELL:
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def test_commands_parse():
    inline = [one.split() for one in re.findall(r"`vaalign ([^`]+)`", EVERYTHING)]
    kinds = next(one.choices for one in _parser()._actions if one.choices)
    assert {words[0] for words in inline} <= set(kinds)  # a word alone speaks of a command
    found = [words for words in inline if len(words) > 1] + [
        words[1:] for words in commands() if words[0] == "vaalign"
    ]
    assert len(found) > 20
    for words in found:
        _parser().parse_args(words)


def test_other_commands_are_known():
    """Targets of make are there, scripts too; what cannot run in a test is named."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for words in commands():
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] == "cp":
            assert (ROOT / words[1]).is_file()
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or f"# {words[1]}\n" in EVERYTHING
        elif words[0] != "vaalign":
            assert words[0].strip(";") in NOT_RUN_HERE | {"umask"}, words
    for one in re.findall(r"`make ([a-z]+)", EVERYTHING):
        assert one in targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", EVERYTHING)) <= set(extras)


def test_a_profile_copied_as_told_is_planned(tmp_path, monkeypatch, capsys):
    shutil.copyfile(ROOT / "data/profiles/smoke.yaml", tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text().replace("name: smoke", "name: mine")
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "run").mkdir()
    assert main(["plan", "--profile", str(tmp_path / "mine.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    assert "together:" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
def test_the_certificate_is_made_as_told(tmp_path):
    (line,) = [one for one in SHELL if "openssl" in one]
    subprocess.run(["bash", "-ec", line.replace("/shared", str(tmp_path))], check=True, capture_output=True)
    assert (tmp_path / "dask.key").stat().st_mode & 0o077 == 0  # only its owner reads it
    assert "BEGIN CERTIFICATE" in (tmp_path / "dask.crt").read_text()


# --- YAML ---------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path):
    (text,) = [one for name, one in YAML.items() if name.startswith("# mine.yaml")]
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path / "mine.yaml"


def test_the_example_profile_is_valid(mine, tmp_path):
    for name in ("my_pairs.jsonl", "my_bench.jsonl", "my_prompts.jsonl"):
        (tmp_path / name).touch()
    own, paper = load_profile(mine), load_profile("paper")
    assert {one.key_variable for one in own.policies.judges.values()} == {"MY_KEY"}
    assert own.policies.judges["judge-b"].refusals_say_nothing
    assert set(own.policies.judges) == set(paper.policies.judges)
    assert own.policies.training["gpt2"].ppo.learning_rate == 1.414e-5


def test_the_example_profile_needs_what_it_names_and_nothing_else(mine, tmp_path, monkeypatch, capsys):
    models = checkpoints(tmp_path)
    (tmp_path / "my").mkdir()
    named = {"gpt2": "gpt2", "qwen2": "qwen2", "mistral": "mistral", "gemma": "backbone"}
    for made, name in (named | {"llama": "reward-model"}).items():
        (tmp_path / models[made]).rename(tmp_path / "my" / name)
    for made, name in zip(data_files(tmp_path).values(), ("pairs", "bench", "prompts"), strict=True):
        (tmp_path / made).rename(tmp_path / f"my_{name}.jsonl")
    (tmp_path / "run").mkdir()
    command = ["plan", "--profile", str(mine), "--run-dir", str(tmp_path / "run")]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("vaalign: this is missing: policies.judges.judge-a: ")
    assert line.count("MY_KEY is not set") == 3  # the key, for three judges
    monkeypatch.setenv("MY_KEY", "secret")
    assert main(command) == 0
    assert "paid calls" in capsys.readouterr().out


def test_the_dask_recipe_names_one_interface_and_demands_certificates():
    settings = dask.config.merge(dask.config.config, yaml.safe_load(YAML["# /shared/dask.yaml"]))
    with dask.config.set(settings):
        security = distributed.Security()
        assert dask.config.get("distributed.scheduler.allowed-failures") == 100
    assert security.require_encryption and security.tls_ca_file == "/shared/dask.crt"
    for role in ("scheduler", "worker", "client"):
        named = security.get_tls_config_for_role(role)
        assert (named["cert"], named["key"]) == ("/shared/dask.crt", "/shared/dask.key")
    schedulers = re.findall(r"dask scheduler --.*", EVERYTHING)
    assert len(schedulers) == 2 and all("--host" in one for one in schedulers)


def test_all_profiles_are_told():
    assert set(re.findall(r"^\| \[(\w+)\]", PAGES["profiles.md"], flags=re.M)) == set(available_profiles())


# --- links and names ----------------------------------------------------------------------------------


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_links_resolve(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists() and target.is_relative_to(ROOT), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link}"


def test_paths_exist():
    named = re.findall(
        r"(?<![\w/])(?:vaalign_lib|benchmarks|data|notebooks|figures|docs|pages)/[\w./*-]*", EVERYTHING
    )
    assert len(named) > 40
    for name in named:
        assert any(ROOT.glob(name.rstrip("./"))), name
    for name in re.findall(r"`((?:theory|training|rewards|experiments|reproduce)/\w*(?:\.py)?)`", EVERYTHING):
        assert (ROOT / "vaalign_lib" / name).exists(), name


# --- numbers ------------------------------------------------------------------------------------------


def found_here(notebook="04_ppo_runs"):
    """Return the published findings of a notebook by their rule."""
    record = json.loads((RESULTS / "findings" / f"{notebook}.json").read_text(encoding="utf-8"))
    return {one["rule"]: one for one in record["findings"]}


def test_the_primary_endpoint_is_the_published_one():
    """The summary has a row for it where it is published, with its ratio, and none where it is not."""
    found = found_here().get("primary.reliability")
    (line,) = [one for one in settings().lines if one.rule == "primary.reliability"]
    page = FINDINGS_PAGE.read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("|") and line.text in row]
    assert len(rows) == (found is not None)
    for row in rows:
        ratio, low, high = (math.exp(found[name]) for name in ("value", "low", "high"))
        assert f"| {ratio:.2f} [{low:.2f}, {high:.2f}] |" in row


def in_one_line(text):
    return " ".join(text.split())


def test_the_numbers_of_the_readme_are_the_published_ones():
    found = found_here()
    for rule, text in (
        ("primary.vanilla", "{:.0f} times smaller than vanilla's ({:.0f} to {:.0f}, a 95% interval"),
        ("primary.reliability", "{:.0f} times smaller ({:.0f} to {:.0f}) than "),
    ):
        numbers = [math.exp(found[rule][name]) for name in ("value", "low", "high")]
        for page in (README, FINDINGS):
            assert text.format(*numbers) in in_one_line(page)


def test_the_numbers_in_the_prose_of_the_findings_are_the_published_ones():
    prose = in_one_line(FINDINGS)
    for notebook, rule, text in (
        (
            "04_ppo_runs",
            "primary.gold_vanilla",
            "gain {:.2f} SDs more gold than vanilla's ({:.2f} to {:.2f})",
        ),
        ("04_ppo_runs", "primary.gold", "{:.2f} more than the placebo's ({:.2f} to {:.2f})"),
        ("04_ppo_runs", "figure6.fresh_noise", "drawn anew {:.2f} ({:.2f} to {:.2f})"),
        ("04_ppo_runs", "figure6.ensemble_noise", "an ensemble for every policy {:.2f} ({:.2f} to {:.2f})"),
        ("05_statistics", "table1.variance_ratios", "equal mean penalty, is {:.2f} ({:.2f} to {:.2f})"),
        ("08_frontier", "frontier.break_even", "squared errors is above {:.2f} ({:.2f} to {:.2f})"),
    ):
        numbers = [found_here(notebook)[rule][name] for name in ("value", "low", "high")]
        assert text.format(*numbers) in prose, rule
    for rule, text in (
        ("people.reliability", "{:.1f} times smaller than the placebo's ({:.1f} to {:.1f})"),
        ("people.vanilla", "{:.1f} times smaller than vanilla's ({:.1f} to {:.1f})"),
        ("people.heads", "({:.2f}, {:.2f} to {:.2f};"),
    ):
        numbers = [math.exp(found_here("10_people")[rule][name]) for name in ("value", "low", "high")]
        assert text.format(*numbers) in prose, rule
    sources = pd.read_parquet(RESULTS / "variance_sources.parquet").set_index("method").loc["10 heads"]
    assert f"heads has a correlation of {sources['correlation']:.2f} with the squared errors" in prose
    ratio = [math.exp(sources[f"log_ratio{end}"]) for end in ("", "_low", "_high")]
    assert "{:.2f} times the (gain / SD)² ({:.2f} to {:.2f})".format(*ratio) in prose


def test_what_judges_and_training_make_is_told_over_the_worlds():
    prose = in_one_line(FINDINGS)
    table = pd.read_parquet(RESULTS / "made_by_judge.parquet")
    made = table.set_index(["made_by", "world", "method"])["variance"]
    for part, text in (
        ("judge", "{:.1f} times smaller for variance-aware policies ({:.1f} to {:.1f}, over worlds;"),
        ("training", "over all four the ratio is {:.2f} ({:.2f} to {:.2f}, over worlds)"),
    ):
        by_world = made[part].unstack()
        logs = np.log(by_world["vanilla"] / by_world["variance_aware"])
        ends = t.interval(0.95, 3, logs.mean(), logs.std(ddof=1) / 2)
        assert len(logs) == 4 and text.format(*np.exp([logs.mean(), *ends])) in prose
    assert (made["judge"].unstack()["vanilla"] > made["training"].unstack()["vanilla"]).all()


def test_slopes_of_the_printed_coefficients_and_contrasts_are_the_published_ones():
    prose, page = in_one_line(FINDINGS), (ROOT / "pages" / "04_ppo_runs.md").read_text()
    for regime, text in (
        ("wind-up", "a slope of {} ({} to {})"),
        ("held", "(slope {}, {} to {})"),
        ("fixed", "fixed ({}, {} to {})"),
    ):
        told = re.search(rf"^\| {regime} \| (\S+) \\\[(\S+), (\S+)\\\] \| \S+ \\\[", page, re.M)
        assert text.format(*told.groups()) in prose
    row = pd.read_parquet(RESULTS / "comparisons.parquet").query("row == 'gpt2-contrasts'").iloc[0]
    ratio = [row[f"ratio{end}"] for end in ("", "_low", "_high")]
    assert "the ratio is {:.2f} ({:.2f} to {:.2f})".format(*ratio) in prose
    less = [-row[f"gap{end}"] for end in ("", "_high", "_low")]
    assert "{:.2f} SDs less gold than vanilla ones ({:.2f} to {:.2f})".format(*less) in prose


def test_controls_are_told_as_published():
    prose, page = in_one_line(FINDINGS), (ROOT / "pages" / "04_ppo_runs.md").read_text()
    told = re.findall(
        r"ratio (\S+), 95% interval (\S+) to (\S+)\); gold gained (\S+) \(vanilla\) and (\S+)\.\n", page
    )
    poor, good = told[-2:]
    gained = "variance-aware policies gain {4} SDs of gold against vanilla's {3} where people disagree most"
    assert f"{gained} about poor".format(*poor) in prose
    assert "{4} against {3} where they disagree most about good".format(*good) in prose
    assert "is {0} ({1} to {2}) and {5} ({6} to {7}) times smaller".format(*poor, *good) in prose


def test_the_numbers_of_the_run_on_another_machine_are_those_that_are_kept():
    kept, told = RESULTS / "other_machine", in_one_line((ROOT / "docs" / "reproduce.md").read_text())
    check = json.loads((kept / "check.json").read_text())
    tables = pd.DataFrame(check["tables"])
    equal = tables[tables["numbers"] == tables["equal"]]
    assert f"Of {len(tables)} tables and lists of findings {len(equal)} are equal" in told
    assert f"({equal['numbers'].sum():,} of them)" in told and not tables["fails"].any()
    assert f"{tables['outside'].sum()} where {tables['expected'].sum():.0f} would be expected" in told
    ratios = pd.read_parquet(kept / "primary_endpoint.parquet").groupby("compared")["log_ratio"].mean()
    placebo, vanilla = (math.exp(ratios[f"{name} : variance-aware"]) for name in ("placebo", "vanilla"))
    assert f"{placebo:.0f} times the placebo's" in told and f"{vanilla:.0f} times vanilla's" in told
    assert f"{placebo:.0f} times the placebo's" in in_one_line(FINDINGS)
    changed = {one["rule"] for one in check["verdicts_changed"]}
    assert changed == set(
        re.findall(r"^- `(primary[\w.]*|figure5[\w.]*)`:", (ROOT / "docs" / "reproduce.md").read_text(), re.M)
    )


def test_gains_on_the_benches_are_the_published_ones():
    prose = in_one_line(FINDINGS)
    dose = pd.read_parquet(RESULTS / "dose_response.parquet").query("noise == 'persistent'")
    aware, none = dose[dose["rho"] == 1]["gain"].item(), dose[dose["weights"] == "none"]["gain"].item()
    assert f"{aware:.2f} against vanilla's {none:.2f} with judges that stay themselves" in prose
    frontier = pd.read_parquet(RESULTS / "frontier.parquet").query("n == 4").set_index(["bench", "method"])
    for bench, text in (
        ("judges", "{:.2f} against {:.2f} at the KL of best of 4"),
        ("unreliable judges", "eight times as noisy: {:.2f} against {:.2f}"),
    ):
        gains = [frontier.loc[(bench, method), "gain"] for method in ("variance-aware", "vanilla")]
        assert text.format(*gains) in prose


def test_shares_of_policies_that_end_below_their_start_are_the_published_ones():
    policies = pd.read_parquet(RESULTS / "runs" / "embedded" / "policies.parquet")
    gold = policies.groupby("run")["gold"]
    shares = {}
    for method in (
        "vanilla-independent",
        *(f"{m}-independent-matched-kl" for m in ("placebo", "variance-aware")),
    ):
        shares[method] = [
            (
                gold.get_group(f"qwen2-judge-b-{method}{world}")
                <= gold.mean()[f"qwen2-judge-b-reference{world}"]
            ).mean()
            for world in ("", "-world-1", "-world-2", "-world-3")
        ]
    vanilla, placebo, aware = shares.values()
    prose = in_one_line(FINDINGS)
    assert (
        f"By world, {min(vanilla):.0%} to {max(vanilla):.0%} of vanilla's policies end at or below" in prose
    )
    assert f"{min(placebo):.0%} to {max(placebo):.0%} of the placebo's" in prose and max(aware) == 0


def test_the_published_part_of_extended_is_told():
    """The table of groups in docs/reproduce.md: stacks of each, and how many of them are published."""
    runs = [
        pd.read_parquet(RESULTS / "runs" / one / "runs.parquet")["run"] for one in ("embedded", "extended")
    ]
    here = set(pd.concat(runs))
    page, groups = PAGES["reproduce.md"], load_profile("extended").policies.runs
    told = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \| (\d+|not yet)\b", page, flags=re.M)
    assert sorted(name for name, *_ in told) == sorted(groups)
    for name, stacks, published in told:
        trained = {one.name for one in conditions.plan([name]) if one.objective != conditions.REFERENCE}
        assert int(stacks) == len(trained), name
        assert int(published.replace("not yet", "0")) == len(trained & here), name
    trained = {one.name for one in conditions.plan(groups) if one.objective != conditions.REFERENCE}
    default = trained & set(runs[0])
    assert (
        f"Of its {len(trained)} stacks {len(trained & here)} are published, {len(default)} of"
        in in_one_line(page)
    )
    assert f"{len(trained & here)} of its {len(trained)} stacks are published" in PAGES["profiles.md"]


def test_the_intervals_of_the_first_world_are_the_published_ones():
    first = pd.read_parquet(RESULTS / "primary_endpoint.parquet").query("world == 0")
    numbers = first[["log_ratio", "log_ratio_low", "log_ratio_high"]].to_numpy().ravel()
    text = "published are {:.2f} ({:.2f} to {:.2f}) and {:.2f} ({:.2f} to {:.2f})".format(*numbers)
    assert text in in_one_line(PAGES["reproduce.md"])


def test_published_runs_are_committed():
    """`--from-results` needs them on a fresh clone."""
    for profile in ("embedded", "extended"):
        for name in ("policies", "runs", "curves", "rewards", "looks"):
            assert (RESULTS / "runs" / profile / f"{name}.parquet").is_file()


def test_the_citation_is_whole():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert f"## {project['version']}" in PAGES["CHANGELOG.md"]
    for key in ("cff-version", "message", "title", "authors"):
        assert cited[key]
    assert "2507.15906" in cited["references"][0]["url"]
