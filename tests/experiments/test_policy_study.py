"""The runs of notebook 04: which there are, and that they end the same however often they are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from vaalign_lib.data.pairs import EMBEDDED, DataError
from vaalign_lib.experiments import conditions
from vaalign_lib.experiments import policies as policy_study
from vaalign_lib.experiments.conditions import (
    ENSEMBLE_ROW,
    GROUPS,
    JUDGE_ROW,
    PLACEBO,
    ROWS,
    Condition,
    group,
    method_of,
    plan,
    stretch_of,
)
from vaalign_lib.experiments.policies import changes_of, kl_of, settings_key, source_of, train_run, train_runs
from vaalign_lib.experiments.results import publish_runs, published, rekey, trained
from vaalign_lib.papers.printed import RANGES
from vaalign_lib.profiles import Judge, Study, load_profile
from vaalign_lib.store import CorruptCheckpointWarning, PlanError, RunDirectoryBusyError, RunStore

SHARED = Condition(*JUDGE_ROW)
PLAIN = replace(SHARED, protocol="independent")  # whose policies are evaluated on their way as well
LOOKS = [1, 3]


def small(iterations=4):
    profile = load_profile("smoke")
    ppo = {name: one.ppo.model_copy(update={"iterations": iterations})
           for name, one in profile.policies.training.items()}  # fmt: skip
    training = {name: one.model_copy(update={"ppo": ppo[name]})
                for name, one in profile.policies.training.items()}  # fmt: skip
    evaluation = profile.policies.evaluation.model_copy(update={"looks": LOOKS})
    policies = profile.policies.model_copy(update={"training": training, "evaluation": evaluation})
    return profile.model_copy(update={"policies": policies})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store in which the reference policies are trained already."""
    one = RunStore(tmp_path_factory.mktemp("store"))
    policy_study.prerequisites(Study(one, small(), 0), [PLAIN])
    return one


# --- which ----------------------------------------------------------------------------------------------


def test_the_embedded_plan_is_that_of_the_study():
    runs = plan(load_profile("embedded").policies.runs)
    assert len(set(runs)) == len(runs)
    assert len(ROWS) == 7 and {ENSEMBLE_ROW, JUDGE_ROW} < set(ROWS)
    everything = plan([*load_profile("embedded").policies.runs, *load_profile("extended").policies.runs])
    assert set(runs) < set(everything) and len({run.name for run in everything}) == len(everything)
    for rows, planned in (((ENSEMBLE_ROW, JUDGE_ROW), runs), (ROWS, everything)):
        assert all(Condition(*row, one) in planned for row in rows for one in conditions.METHODS)
    for run in everything:
        assert run.start in everything and (run.objective == "reference" or run.vanilla in everything)
    assert {run.name for run in runs if run.objective == PLACEBO} == {
        "qwen2-judge-b-placebo-independent-matched-kl" + world
        for world in ("", "-world-1", "-world-2", "-world-3")
    }


def test_the_primary_endpoint_compares_three_methods_in_every_world():
    stacks = [run for run in plan(["primary"]) if run.objective != "reference"]
    found = [(run.world, run.objective, run.protocol, run.matched) for run in stacks]
    kinds = (("vanilla", False), ("variance_aware", True), (PLACEBO, True))
    assert found == [(world, *(kind[0], "independent", kind[1])) for world in range(4) for kind in kinds]
    starts = {run.start for run in stacks}
    assert {run.world for run in starts} == set(range(4)) and all(
        run.objective == "reference" for run in starts
    )


def test_printed_coefficients_come_at_three_rates_in_every_range():
    stacks = [run for run in plan(["ranges"]) if run.objective != "reference"]
    for regime in ("as_printed", "printed_gentle", "printed_fixed"):
        assert [run.highest for run in stacks if run.regime == regime][::2] == list(RANGES)
    assert len(stacks) == 3 * 2 * len(RANGES) and all(run.printed for run in stacks)


def test_contrasts_have_the_vanilla_stack_of_the_ensemble():
    (run,) = group("contrasts")
    ensemble = Condition(*ENSEMBLE_ROW, "variance_aware", protocol="independent", regime="matched_kl")
    assert run.vanilla == ensemble.vanilla and run.start == ensemble.start and run.pilot.source == "contrasts"


def test_a_placebo_is_trained_as_the_variance_aware_method_is():
    aware, placebo = group("primary")[:2]
    assert (aware.objective, placebo.objective) == ("variance_aware", PLACEBO)
    assert method_of(placebo, 0.3) == method_of(aware, 0.3) and placebo.vanilla == aware.vanilla


def test_gentle_rates_are_of_the_profile_and_the_rest_is_as_printed(store):
    study = Study(store, small(), 0)
    found = {
        regime: changes_of(study, replace(SHARED, regime=regime))
        for regime in ("equal_mean_penalty", "as_printed", "printed_gentle", "printed_fixed")
    }
    printed, rate = found["as_printed"], {"learning_rate": small().policies.training["qwen2"].gentle_rate}
    assert found["equal_mean_penalty"] == {} and printed["adaptive_kl"]["target"] == 0.7
    assert found["printed_gentle"] == printed | rate
    assert found["printed_fixed"] == printed | rate | {"adaptive_kl": None}
    with pytest.raises(
        ValueError, match=r"training\.gpt2\.gentle_rate: gpt2-judge-b-vanilla-printed-gentle needs"
    ):
        changes_of(study, Condition("gpt2", "judge-b", regime="printed_gentle"))


def test_every_group_has_pairs_of_methods():
    for name in GROUPS:
        runs = plan([name])
        for run in runs:
            assert run.vanilla in runs or run.objective == "reference"


def test_the_key_follows_what_determines_a_run():
    profile = small()
    keys = {
        settings_key(small(5), 0, PLAIN),
        settings_key(profile, 0, PLAIN),
        settings_key(profile, 1, PLAIN),
        settings_key(profile, 0, replace(PLAIN, repeat=1)),
        settings_key(profile, 0, replace(PLAIN, highest=50)),
    }
    assert len(keys) == 5
    assert settings_key(profile, 0, replace(PLAIN, world=1)) == settings_key(profile, 1, PLAIN)
    other_plan = profile.policies.model_copy(update={"runs": ["controls"]})
    assert settings_key(profile.model_copy(update={"policies": other_plan}), 0, PLAIN) in keys


def test_printed_widths_vary_as_much_as_table_4_says(store):
    """Relative to the scale, the SD of the intervals' standard deviations follows its second column."""
    profile, spread = small(), {}
    prompts = policy_study.World(0).prompts(400, np.random.default_rng(0))
    answers = policy_study.World(0).responses(prompts, np.full(400, 0.5), np.random.default_rng(1))
    for widths in ("rescaled", "printed"):
        for top in RANGES:
            judge = source_of(Study(store, profile, 0), replace(PLAIN, highest=top, widths=widths))
            judgement = judge.judge(prompts, answers, np.zeros(400, dtype=np.int64))
            spread[widths, top] = np.sqrt(judgement.variance()).std() / (top - 1)
    for top in RANGES:
        assert spread["rescaled", top] == pytest.approx(spread["rescaled", 100], rel=0.01)
        ratio = spread["printed", top] / spread["printed", 100]
        assert ratio == pytest.approx(stretch_of(replace(PLAIN, highest=top, widths="printed")), rel=0.1)
    assert stretch_of(replace(PLAIN, highest=20, widths="printed")) == pytest.approx(
        np.sqrt(0.92) / 19 / (np.sqrt(17) / 99)
    )


def test_a_rescaled_judge_trains_the_same_policies_at_equal_mean_penalty(store):
    """Standardized rewards and variances do not know the scale; that is why Figure 7 needs one stack."""
    folders = [train_run(Study(store, small(2), 0), replace(PLAIN, highest=top)) for top in (100, 20)]
    wide, narrow = (pd.read_parquet(folder / "policies.parquet") for folder in folders)
    np.testing.assert_allclose(wide["gold"], narrow["gold"], rtol=1e-6)
    np.testing.assert_allclose((wide["true_reward"] - 1) / 99, (narrow["true_reward"] - 1) / 19, rtol=1e-6)


# --- how they end ---------------------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from tests.experiments.test_policy_study import PLAIN, small
from vaalign_lib.experiments.policies import train_run
from vaalign_lib.profiles import Study
from vaalign_lib.store import Checkpoints, RunStore
from vaalign_lib.training import run
run.CHECKPOINT_SECONDS = 0.0
save = Checkpoints.save
def announced(self, step, state):
    path = save(self, step, state)
    Path(sys.argv[2]).write_text(str(step))
    return path
Checkpoints.save = announced
train_run(Study(RunStore(Path(sys.argv[1])), small(), 0), PLAIN)
"""


def start(store, marker):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(store.root), str(marker)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory):
    other = RunStore(tmp_path_factory.mktemp("uninterrupted"))
    for folder in store.root.glob("reference-*"):
        (other.root / folder.name).symlink_to(folder)
    return train_run(Study(other, small(), 0), PLAIN)


def test_killed_and_damaged_a_run_ends_as_if_it_had_not_been(store, uninterrupted, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    for step in (1, 2):
        process = start(store, marker)
        deadline = time.monotonic() + 300
        while not (marker.exists() and marker.read_text() >= str(step)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    scratch = next(store.root.glob("*.scratch"))
    newest = max(scratch.glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    monkeypatch.setattr("vaalign_lib.training.run.CHECKPOINT_SECONDS", 0.0)
    with pytest.warns(CorruptCheckpointWarning):
        folder = train_run(Study(store, small(), 0), PLAIN)
    assert folder.name == uninterrupted.name and not scratch.exists()
    for name in ("policies.parquet", "looks.parquet", "log.parquet"):
        ours, theirs = (pd.read_parquet(one / name) for one in (folder, uninterrupted))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert len(ours) == 4 * 4


def test_looks_are_evaluations_on_the_way(uninterrupted):
    looks, end = (pd.read_parquet(uninterrupted / name) for name in ("looks.parquet", "policies.parquet"))
    assert looks[["step", "policy"]].to_numpy().tolist() == [[step, k] for step in LOOKS for k in range(4)]
    assert set(looks) == set(end) - {"step_length"} | {"step"}
    means = [looks.loc[looks["step"] == step, "kl"].mean() for step in LOOKS] + [end["kl"].mean()]
    assert 0 < means[0] < means[1] < means[2]


def test_looks_from_the_last_step_on_are_left_out(store):
    """A profile of few steps may inherit the looks of one with many."""
    folder = train_run(Study(store, small(3), 0), PLAIN)
    assert pd.read_parquet(folder / "looks.parquet")["step"].unique().tolist() == [1]


def test_two_processes_do_not_make_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr("vaalign_lib.store.WAIT", 0.1)
    one, other = RunStore(tmp_path), RunStore(tmp_path)

    def write(folder, scratch):
        with pytest.raises(RunDirectoryBusyError, match="another process"):
            other.resumable("result", write, {})
        (folder / "done").touch()

    assert (one.resumable("result", write, {}) / "done").exists()
    assert not list(tmp_path.glob("*.scratch"))


def test_workers_give_the_same_results_and_find_matching_penalties(store, uninterrupted, tmp_path):
    runs = [*plan(["primary"])[:3], SHARED, PLAIN.start]
    assert runs[0] == PLAIN and runs[2].objective == PLACEBO
    folders = train_runs(Study(store, small(), 0), runs, workers=2)
    assert list(folders) == runs
    ours, theirs = (pd.read_parquet(one / "policies.parquet") for one in (folders[PLAIN], uninterrupted))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    for matched in (folders[run] for run in runs[1:3]):
        attempts = pd.read_parquet(matched / "attempts.parquet")
        assert attempts["kl"].iloc[-1] == kl_of(matched)
    table = pd.concat([pd.read_parquet(one / "policies.parquet") for one in folders.values()])
    assert len(table) == 4 * len(runs) and (table["true_reward_error"] > 0).all()
    moved = [
        pd.read_parquet(folders[run] / "policies.parquet")["step_length"] for run in (PLAIN, PLAIN.start)
    ]
    rate = small().policies.training[PLAIN.architecture].settings("vanilla").learning_rate
    assert moved[0].between(rate / 10, 10 * rate).all() and not moved[1].any()
    policy = AutoModelForCausalLM.from_pretrained(folders[PLAIN] / "policy")
    assert policy.config.model_type == PLAIN.architecture


def test_what_is_published_is_read_again_and_not_trained(store, uninterrupted, tmp_path):
    never = Condition("gpt2", "ensemble", repeat=3)
    for one in (PLAIN, PLAIN.start):
        train_run(Study(store, small(), 0), one)
    runs = [PLAIN, PLAIN.start, never]  # the first with looks
    with pytest.raises(DataError, match=r"publish: 2 of 3 stacks are trained in .*together"):
        publish_runs(Study(store, small(), 0), runs, tmp_path, whole=True)
    assert not list(tmp_path.glob("*/*.parquet"))  # stacks of two runs would be compared
    assert (
        publish_runs(Study(store, small(), 0), [never], tmp_path, whole=True) == []
    )  # none yet: nothing to refuse
    assert publish_runs(Study(store, small(), 0), runs, tmp_path) == [PLAIN.name, PLAIN.start.name]
    assert publish_runs(Study(store, small(), 0), runs, tmp_path) == []  # nothing new
    found = published(small(), 0, tmp_path)
    own = trained(
        Study(store, small(), 0), {one: train_run(Study(store, small(), 0), one) for one in runs[:2]}
    )
    for name in ("policies", "runs", "curves", "looks"):
        theirs, ours = getattr(found, name), getattr(own, name)[list(getattr(found, name))]
        pd.testing.assert_frame_equal(
            theirs.drop(columns="origin", errors="ignore"),
            ours.drop(columns="origin", errors="ignore"),
            check_exact=True,
            check_dtype=False,
        )
    assert found.looks.groupby("step")["policy"].count().to_dict() == dict.fromkeys([*LOOKS, 4], 4)
    last = found.looks[found.looks["step"] == 4].set_index("policy")["gold"]
    assert last.equals(found.policies[found.policies["run"] == PLAIN.name].set_index("policy")["gold"])
    exact = pd.read_parquet(uninterrupted / "policies.parquet")["true_reward"]
    mine = found.policies.loc[found.policies["run"] == PLAIN.name, "true_reward"]
    np.testing.assert_allclose(mine, exact, rtol=1e-6)
    assert train_runs(Study(RunStore(tmp_path / "new"), small(), 0), runs[:2], 1, found.kl()) == {}
    nothing = trained(Study(RunStore(tmp_path / "new"), small(), 0), {}).joined(found)
    assert nothing.names == found.names
    assert not published(small(), 1, tmp_path).names  # of another world
    assert not published(small(iterations=5), 0, tmp_path).names  # other settings


def test_a_run_is_published_once(store, tmp_path):
    for one in (PLAIN, PLAIN.start):
        train_run(Study(store, small(), 0), one)
    other = small().model_copy(update={"name": "other"})
    publish_runs(Study(store, other, 0), [PLAIN], tmp_path)
    assert publish_runs(Study(store, small(), 0), [PLAIN, PLAIN.start], tmp_path) == [PLAIN.start.name]
    found = published(small(), 0, tmp_path).runs.set_index("run")["origin"]
    assert found.to_dict() == {PLAIN.name: "published, other", PLAIN.start.name: f"published, {small().name}"}


def test_published_runs_stay_when_others_come(store, tmp_path):
    for one in (PLAIN, PLAIN.start):
        train_run(Study(store, small(), 0), one)
    publish_runs(Study(store, small(), 0), [PLAIN], tmp_path)
    assert publish_runs(Study(store, small(), 0), [PLAIN.start], tmp_path) == [PLAIN.start.name]
    assert published(small(), 0, tmp_path).names == {PLAIN.name, PLAIN.start.name}


def test_published_runs_get_the_keys_of_their_profile_as_it_is_now(store, tmp_path, monkeypatch):
    for one in (PLAIN, PLAIN.start):
        train_run(Study(store, small(), 0), one)
    publish_runs(Study(store, small(), 0), [PLAIN, PLAIN.start], tmp_path)
    before, widened = published(small(), 0, tmp_path), small(iterations=5)
    monkeypatch.setattr("vaalign_lib.experiments.results.load_profile", lambda name: widened)
    rekey(tmp_path)
    assert not published(small(), 0, tmp_path).names
    found = published(widened, 0, tmp_path)
    for name in ("policies", "curves", "looks"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(before, name), check_exact=True)
    pd.testing.assert_frame_equal(found.runs.drop(columns="settings"), before.runs.drop(columns="settings"))


def real(**policies):
    """Return the smoke profile with prompts of a file and other changes."""
    changed = small().policies.model_copy(update={"data": "prompts.jsonl"} | policies)
    return small().model_copy(update={"policies": changed})


def test_what_only_the_embedded_world_has_is_refused_in_words(store):
    with pytest.raises(ValueError, match="judge-b is simulated in the embedded world only"):
        source_of(Study(store, real(), 0), PLAIN)
    judged = real(judges={"judge-b": Judge(model="some-model")})
    assert source_of(Study(store, judged, 0), SHARED).model == "some-model"
    for change in ({"protocol": "independent"}, {"widths": "printed"}, {"disagreement": "good"}):
        with pytest.raises(ValueError, match="only simulated judges can be independent"):
            source_of(Study(store, judged, 0), replace(SHARED, **change))


def test_keys_follow_contents_and_not_how_a_judge_is_asked(tmp_path):
    def config(profile, run=PLAIN):
        return policy_study._config(profile, 0, run)["settings"]

    assert not {"judges", "judge"} & set(config(small())["policies"])
    assert config(small())["policies"]["data"] == EMBEDDED
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("one")
    profile = real(data=str(prompts), judges={"judge-b": Judge(model="m", requests=2)})
    before = config(profile)
    assert before["policies"]["judge"] == ["m", False]
    assert "judge" not in config(profile, Condition("qwen2", "judge-a"))["policies"]
    asked = real(data=str(prompts), judges={"judge-b": Judge(model="m", requests=9, base_url="http://u")})
    assert config(asked) == before
    silent = Judge(model="m", refusals_say_nothing=True)
    assert config(real(data=str(prompts), judges={"judge-b": silent})) != before
    prompts.write_text("two")
    assert config(profile) != before


# --- in parts -------------------------------------------------------------------------------------------


def test_in_parts_a_run_ends_as_in_one(store, uninterrupted, tmp_path, monkeypatch):
    other = RunStore(tmp_path)
    for folder in store.root.glob("reference-*"):
        (other.root / folder.name).symlink_to(folder)
    monkeypatch.setattr(policy_study, "fitting", lambda *_: 3)
    parts = policy_study._parts_of(small(), PLAIN, tmp_path / "scratch")
    assert parts == [range(3), range(3, 4)]
    monkeypatch.setattr(policy_study, "fitting", lambda *_: 2)  # the next worker has less memory
    assert policy_study._parts_of(small(), PLAIN, tmp_path / "scratch") == parts
    folder = train_run(Study(other, small(), 0), PLAIN)
    for name in ("policies.parquet", "looks.parquet", "log.parquet"):
        ours, theirs = (pd.read_parquet(one / name) for one in (folder, uninterrupted))
        keys = [key for key in ("step", "policy") if key in ours]
        ours, theirs = (one.sort_values(keys, ignore_index=True) for one in (ours, theirs))
        # training bit by bit; the reference's pass in the evaluation rounds by the size of its batch
        exact = {"check_exact": True} if name == "log.parquet" else {"rtol": 1e-6}
        pd.testing.assert_frame_equal(ours, theirs, **exact)
    spent = json.loads((folder / "resources.json").read_text())
    assert spent["policies"] == 4 and (folder / "policy" / "model.safetensors").is_file()
    monkeypatch.setattr(policy_study, "fitting", lambda *_: 0)
    with pytest.raises(PlanError, match="qwen2-judge-b-vanilla-independent: one policy needs about"):
        policy_study._size_that_fits(small(), PLAIN)
    assert not list(tmp_path.glob("*.scratch")) and not list(tmp_path.glob("part-*"))
