"""Trained policies of notebook 10: compared, shown and published."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from pandas.io.formats.style import Styler

from vaalign_lib import profiles
from vaalign_lib.experiments import people_policies
from vaalign_lib.experiments.conditions import HEADS_ROW, PEOPLE_ROW, PLACEBO, REFERENCE, plan
from vaalign_lib.experiments.people_policies import ASKED, COMMITTED, TOLERANCE, stacks
from vaalign_lib.experiments.policies import train_run
from vaalign_lib.figures import people as figures
from vaalign_lib.profiles import ProfileError, Study
from vaalign_lib.store import DATA, NOTEBOOKS, PROFILES, ROOT, RunStore

ERROR = 0.05  # of an evaluation
DEVIATIONS = {REFERENCE: 0.0, "vanilla": 0.6, "variance_aware": 0.3, PLACEBO: 0.5}
GAINS = {REFERENCE: 0.0, "vanilla": 1.2, "variance_aware": 1.0, PLACEBO: 1.1}
KLS = {REFERENCE: 0.0, "vanilla": 0.5, "variance_aware": 0.52, PLACEBO: 0.48}


def made(count, row=PEOPLE_ROW, error=ERROR, kls=KLS, gains=GAINS):
    """Return tables of made-up stacks of a row, as `of_trained` does."""
    policies, answers = [], []
    for method, run in stacks(row).items():
        random = np.random.default_rng([count, *map(ord, run.name)])
        values = 0.4 + gains[method] + random.normal(0, np.hypot(DEVIATIONS[method], ERROR), count)
        about = {"run": run.name, **asdict(run), "policy": range(count), "true_reward": values}
        about |= {"true_reward_error": error, "kl": kls[method], "variance": 1 + random.random(count)}
        policies.append(pd.DataFrame(about | {"length": 20.0, "gold": np.nan}))
        told = [f"{method} <b>{prompt}</b>" for prompt in range(2)]
        answers.append(pd.DataFrame({"policy": 0, "prompt": range(2), "answer": told, "run": run.name}))
    curves = [{"run": run.name, "step": step} for run in stacks(row).values() for step in (58, 59)]
    curves = pd.DataFrame([one for one in curves if REFERENCE not in one["run"]])
    runs = pd.DataFrame({"run": [one.name for one in stacks(row).values()]})
    joined = {"policies": pd.concat(policies), "answers": pd.concat(answers)}
    return {"curves": curves, "runs": runs} | joined


def values_of(tables, method, row=PEOPLE_ROW):
    """Return the true rewards of one stack's policies."""
    policies = tables["policies"]
    return policies.loc[policies["run"] == stacks(row)[method].name, "true_reward"].to_numpy()


def test_the_tolerance_and_the_number_are_those_of_protocol_and_profile():
    protocol = (DATA / "protocols" / "10.md").read_text()
    assert (
        f"the mean KL is vanilla's within {TOLERANCE:.0%}" in protocol
        and f"With {ASKED} policies" in protocol
    )
    asked = profiles.read_yaml(PROFILES / "pretrained.yaml")["policies"]
    assert (asked["count"], asked["matching"]["tolerance"]) == (ASKED, TOLERANCE)


def test_methods_are_told_as_by_hand():
    tables = made(30, kls=KLS | {PLACEBO: 0.56})
    table = people_policies.by_method(tables).set_index("method")
    assert list(table.index) == ["vanilla", "variance_aware", PLACEBO]
    bar = values_of(tables, REFERENCE).mean()
    for method, line in table.iterrows():
        values = values_of(tables, method)
        assert line["gain"] == pytest.approx(values.mean() - bar)
        assert line["variance"] == pytest.approx(((values - values.mean()) ** 2).sum() / 29 - ERROR**2)
        assert line["gain_low"] < line["gain"] < line["gain_high"] and line["noise"] == pytest.approx(
            ERROR**2
        )
        assert line["risk"] == (values <= bar).mean() and (line["policies"], line["steps"]) == (30, 59)
    assert table["kl_off"].tolist() == pytest.approx([0, 0.04, 0.12])
    assert table["equal_kl"].tolist() == ["yes", "yes", "no"]


@pytest.mark.parametrize("rival", [PLACEBO, "vanilla"])
def test_contrasts_are_those_by_hand(rival):
    count, tables = 200, made(200)
    line = people_policies.contrasts(tables, 400).set_index("rival").loc[rival]
    bar = values_of(tables, REFERENCE).mean()
    rows = np.random.default_rng([0, 0, 0]).integers(count, size=(400, count))
    pair, logs, drawn = [values_of(tables, one) for one in (rival, "variance_aware")], [], []
    for values in pair:
        variance = values.var(ddof=1) - ERROR**2
        logs.append([np.log(variance), 2 * np.log(values.mean() - bar)])
        again = values[rows].var(axis=1, ddof=1) * count / (count - 1) - ERROR**2
        drawn.append([np.log(again), 2 * np.log(values[rows].mean(axis=1) - bar)])
    (v, g), (v_drawn, g_drawn) = np.subtract(*logs), np.subtract(*drawn)
    ends = [np.quantile(one, [0.025, 0.975]) for one in (v_drawn - g_drawn, np.exp(v_drawn))]
    assert line[["log_ratio", "ratio"]].tolist() == pytest.approx([v - g, np.exp(v)])
    assert line[["log_ratio_low", "log_ratio_high"]].tolist() == pytest.approx(ends[0].tolist())
    assert line[["ratio_low", "ratio_high"]].tolist() == pytest.approx(ends[1].tolist())
    assert line["difference"] == pytest.approx(np.mean(pair[1] - pair[0])) and line["policies"] == count
    truth = 2 * np.log(DEVIATIONS[rival] / 0.3) - 2 * np.log(GAINS[rival] / GAINS["variance_aware"])
    assert line["log_ratio_low"] < truth < line["log_ratio_high"] and line["said"] == "L above 0"


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_few_policies_decide_nothing(count):
    table = people_policies.contrasts(made(count))
    assert len(table) == 2 and (table["policies"] == count).all()
    assert np.isfinite(table.select_dtypes(float)).all(axis=None)
    few = f"unclear: {count} policies of 24"
    assert all(said.startswith((few, "not determinable")) for said in table["said"])
    if count < 4:  # one policy is drawn alone too often
        assert table["said"].str.startswith("not determinable").all()


def test_a_variance_that_is_all_noise_is_not_determinable():
    table = people_policies.contrasts(made(40, error=2.0))
    assert np.isfinite(table.select_dtypes(float)).all(axis=None)
    both = "not determinable: not above the noise of the evaluation: variance of {} and variance-aware"
    assert table["said"].tolist() == [both.format(PLACEBO), both.format("vanilla")]
    assert (people_policies.by_method(made(40, error=2.0))["variance"] < 0).all()


def test_what_speaks_against_a_contrast_is_said():
    apart = people_policies.contrasts(made(60, kls=KLS | {"variance_aware": 0.3}))["said"]
    assert apart.str.startswith("unclear: KL of variance-aware off by -40%").all()
    without = people_policies.contrasts(made(60, gains=GAINS | {"variance_aware": 0.02})).set_index("rival")
    assert "gain of variance-aware not above 0 by two standard errors" in without.loc[PLACEBO, "said"]


def test_rows_and_methods_that_were_not_trained_are_left_out():
    rows = made(5), made(5, HEADS_ROW)
    both = {name: pd.concat([one[name] for one in rows]) for name in rows[0]}
    assert people_policies.contrasts(both)["row"].tolist() == ["people"] * 2 + ["heads"] * 2
    trained = both["policies"]["objective"].isin([REFERENCE, "vanilla"])
    only = both | {"policies": both["policies"][trained]}
    assert people_policies.by_method(only)["method"].tolist() == ["vanilla"] * 2
    assert people_policies.contrasts(only).empty
    assert list(people_policies.side_by_side(only)) == ["prompt", REFERENCE, "vanilla", "row"]
    assert len(figures.trained(people_policies.gains(both)).axes) == 2


# --- what is trained, published and drawn ---------------------------------------------------------------


@pytest.fixture(scope="module")
def published(study, tmp_path_factory):
    """Return what is published of the stacks of the tiny model, all trained, and their folders."""
    folder = tmp_path_factory.mktemp("published")
    folders = {run: train_run(study, run) for run in plan(study.profile.policies.runs)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people_policies, "results", lambda study: {"bench": pd.DataFrame({"row": ["people"]})})
        people_policies.publish(study, folder)
    return people_policies.committed(folder), folders


def test_what_was_trained_is_published(published):
    tables, folders = published
    assert set(tables) == {"bench", "policies", "runs", "curves", "answers"}
    for run, folder in folders.items():
        policies = pd.read_parquet(folder / "policies.parquet")
        told, shown = (tables[one][tables[one]["run"] == run.name] for one in ("policies", "answers"))
        assert np.allclose(told["true_reward"], policies["true_reward"], rtol=1e-6)
        written = pd.read_parquet(folder / "answers.parquet")
        first = [written.query("policy == 0 and prompt == @k")["answer"].iloc[0] for k in range(4)]
        assert shown["answer"].tolist() == first
    assert people_policies.by_method(tables)["policies"].tolist() == [2] * 3
    assert len(people_policies.contrasts(tables)) == 2


def test_what_is_not_trained_yet_is_not_published(study, published, tmp_path, monkeypatch):
    monkeypatch.setattr(people_policies, "results", lambda study: {})
    store = RunStore(tmp_path / "store")
    nothing = people_policies.publish(Study(store, study.profile, 0), tmp_path / "nothing")
    assert nothing == []
    store.root.mkdir(exist_ok=True)
    for folder in study.store.root.iterdir():
        if PLACEBO not in folder.name:
            (store.root / folder.name).symlink_to(folder)
    people_policies.publish(Study(store, study.profile, 0), tmp_path / "part")
    tables = people_policies.committed(tmp_path / "part")
    assert people_policies.by_method(tables)["method"].tolist() == ["vanilla", "variance_aware"]


def test_one_policy_is_not_trained(study):
    one = study.profile.model_copy(
        update={"policies": study.profile.policies.model_copy(update={"count": 1})}
    )
    with pytest.raises(ProfileError, match=r"policies\.count: expected two or more"):
        people_policies.results(replace(study, profile=one), train=True)


def test_the_profile_of_few_policies_is_the_shipped_one_but_for_its_number(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "pretrained.md").read_text(), flags=re.S)
    (tmp_path / "few.yaml").write_text(text)
    paths = tmp_path / "few.yaml", PROFILES / "pretrained.yaml"
    few, shipped = (profiles._with_base(one) for one in paths)
    assert few["name"] == "few" and few["policies"]["count"] < shipped["policies"]["count"]
    assert few["policies"]["training"] == shipped["policies"]["training"]
    for name, path in shipped["raters"].items():  # beside the shipped profile, wherever this one lies
        assert few["raters"][name] == str(PROFILES / path)


@pytest.mark.parametrize("trained", [{}, made(4), made(30)], ids=["none", "few", "many"])
def test_the_notebook_shows_what_was_trained(trained, tmp_path, monkeypatch, capsys):
    """Its cells run here on the committed tables without trained policies, and with made-up ones."""
    names = "policies", "runs", "curves", "answers"
    plain = {name: one for name, one in people_policies.committed(COMMITTED).items() if name not in names}
    monkeypatch.setattr(people_policies, "results", lambda *_: plain | trained)
    cells = json.loads((NOTEBOOKS / "10_people.ipynb").read_text())["cells"]
    code = {one["id"]: "".join(one["source"]) for one in cells if one["cell_type"] == "code"}
    about = {"profile": "smoke", "run_dir": str(tmp_path)}
    scope = {"display": lambda shown: print(shown.to_html() if isinstance(shown, Styler) else shown.data)}
    for name in ("cell-01", "cell-02", "cell-03", *(one for one in code if one.startswith("trained-"))):
        exec(compile(code[name].replace("import Markdown, display", "import Markdown"), name, "exec"), scope)
        scope |= about if name == "cell-01" else {}
    made_files = {path.stem for path in tmp_path.rglob("people_trained.*")}
    told = capsys.readouterr().out
    assert made_files == ({"people_trained"} if trained else set())
    assert ("No policies have been trained yet." in told) == (not trained)
    if trained:
        assert "variance aware &#60;b&#62;" not in told and "variance&#95;aware &#60;b&#62;0" in told
        assert ("unclear: 4 policies of 24" in told) == (len(trained["policies"]) == 16)
