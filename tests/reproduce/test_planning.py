"""What a plan says: counts, what is done already, what is missing."""

import pandas as pd
import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.conditions import Condition, plan
from vaalign_lib.experiments.policies import train_run
from vaalign_lib.models import tiny_config
from vaalign_lib.profiles import Judge, Lora, Study, load_profile
from vaalign_lib.reproduce import plan as planning
from vaalign_lib.reproduce.cli import main
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.store import PlanError, RunStore
from vaalign_lib.training.memory import Sizes
from vaalign_lib.training.objectives import Method
from vaalign_lib.training.run import embedded_task, policy_trainer

SMOKE = load_profile("smoke")


def with_judges(**changes):
    judge = Judge(model="some-model", key_variable="NOBODYS_KEY")
    update = {"judges": {"judge-b": judge}, "runs": ["rows"]} | changes
    return SMOKE.model_copy(update={"policies": SMOKE.policies.model_copy(update=update)})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    store = RunStore(tmp_path_factory.mktemp("store"))
    return planning.planned(Study(store, with_judges(), 0)).set_index("run")


def test_judgements_are_counted(table):
    run = table.loc[Condition("qwen2", "judge-b").name]
    sizes = SMOKE.policies
    ppo = sizes.training["qwen2"].ppo
    evaluated = sizes.count * sizes.evaluation.prompts * sizes.evaluation.samples
    trained = sizes.count * ppo.iterations * ppo.batch_size
    assert run["responses"] == evaluated + trained + sizes.warm_up
    assert run["calls"] == 2 * run["responses"]  # what is no interval is asked for once more
    assert run["steps"] == ppo.iterations
    assert table.loc[Condition("qwen2", "judge-a").name, "calls"] == 0  # simulated
    start = table.loc[Condition("qwen2", "judge-b").start.name]
    assert (start["steps"], start["responses"]) == (0, evaluated)


def test_amounts_are_plausible(table, tmp_path):
    left = table[table["steps"] > 0]
    assert (left["seconds"] > 0).all() and (left["together"] == SMOKE.policies.count).all()
    assert (left["gigabytes"] < 0.1).all() and (left["disk"] < 0.1).all()
    long = with_judges(count=40)
    more = planning.planned(Study(RunStore(tmp_path), long, 0)).set_index("run")
    both = Condition("qwen2", "judge-b").name
    assert 5 < more.loc[both, "seconds"] / table.loc[both, "seconds"] < 15


def test_time_is_that_of_products_in_the_precision_of_training(table, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "flops", {"float32": 1e9, "bfloat16": 4e9}.get)
    training = SMOKE.policies.training["qwen2"].model_copy(update={"precision": "bfloat16"})
    sizes = SMOKE.policies.model_copy(update={"training": SMOKE.policies.training | {"qwen2": training}})
    found = [
        planning.planned(Study(RunStore(tmp_path), one, 0)).set_index("run")["seconds"]
        for one in (SMOKE, SMOKE.model_copy(update={"policies": sizes}))
    ]
    ratio = found[0] / found[1]
    assert (ratio[ratio.index.str.startswith("qwen2")] == 4).all()
    assert (ratio[ratio.index.str.startswith("mistral")] == 1).all()


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}


@pytest.mark.parametrize("lora", [None, LORA, LORA | {"layers_to_transform": [3]}])
def test_counted_products_are_those_of_a_step(lora, tmp_path):
    """Against torch's count of a step of PPO with one epoch and with three."""
    lora = lora and Lora(**lora)
    training = SMOKE.policies.training["qwen2"].model_copy(update={"lora": lora})
    policies = SMOKE.policies.model_copy(update={"training": {"qwen2": training}, "warm_up": 4})
    profile = SMOKE.model_copy(update={"policies": policies})
    AutoModelForCausalLM.from_config(tiny_config("qwen2", 192, layers=4)).save_pretrained(tmp_path)
    world_tokenizer().save_pretrained(tmp_path)
    world, found = World(0), []
    task = embedded_task(profile, stand_ins(world)["stand-in for Gemini 1.5 Flash"], world)
    given = profile, "qwen2", tmp_path, task, Method()
    for epochs in (1, 3):
        trainer = policy_trainer(*given, policies=[0, 1], ppo_epochs=epochs)
        with FlopCounterMode(display=False) as counter:
            trainer.step()
        found.append(counter.get_total_flops())
    stack, sampling = trainer.stack, trainer.sampling
    weights = sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    sizes = Sizes(weights, 0, 4, 192, stack.config.vocab_size, frozen=stack.frozen)
    once, again = planning._products(sizes, training)
    tokens = 2 * trainer.settings.batch_size * (trainer._prompts.ids.shape[1] + sampling.max_new_tokens)
    assert (found[1] - found[0]) / 2 == pytest.approx(tokens * again, rel=0.25)
    assert found[0] == pytest.approx(tokens * (once + again), rel=0.25)


def test_what_is_done_is_not_to_do(tmp_path):
    store, run = RunStore(tmp_path / "store"), Condition("qwen2", "judge-a").start
    train_run(Study(store, SMOKE, 0), run)
    found = planning.planned(Study(store, SMOKE, 0)).set_index("run")["state"]
    assert found[run.name] == "done" and (found == "done").sum() == 1
    text = planning.in_words(planning.planned(Study(store, SMOKE, 0)), 2)
    assert text.startswith(f"{len(plan(SMOKE.policies.runs))} runs: 1 done, 0 published")
    assert run.name not in text


def test_what_is_missing_is_told_all_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("NOBODYS_KEY", raising=False)
    nowhere = with_judges(data=str(tmp_path / "no.jsonl"))
    (told,) = planning.missing_first(nowhere)
    assert "policies.data:" in told and "there is no such file" in told
    _, lacks = planning.complete_plan(Study(RunStore(tmp_path / "store"), nowhere, 0), 1)
    assert told in lacks and any("NOBODYS_KEY is not set" in one for one in lacks)
    data = SMOKE.reward_data.model_copy(update={"evaluation": str(tmp_path / "bench.jsonl")})
    profile = with_judges().model_copy(update={"reward_data": data})
    profile = profile.model_copy(update={"true_reward": str(tmp_path / "no model")})
    found = planning.planned(Study(RunStore(tmp_path), profile, 0))
    told = "\n".join(planning.missing(profile, found, tmp_path / "run"))
    assert "policies.judges.judge-b: the environment variable NOBODYS_KEY is not set" in told
    assert "reward_data.evaluation:" in told and "true_reward:" in told
    huge = found.assign(together=0, disk=1e9)
    told = "\n".join(planning.missing(profile, huge, tmp_path / "run"))
    assert "GB of memory" in told and "GB are needed" in told
    done = found.assign(state="done")
    assert planning.missing(profile, done, tmp_path) == []


def test_real_models_and_paid_judges_are_planned_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("NOBODYS_KEY", "secret")
    profile, store = with_judges(), RunStore(tmp_path / "store")
    assert "paid calls" in planning.checked_plan(Study(store, profile), 1)
    assert planning.checked_plan(Study(store, SMOKE), 1) == ""  # nothing real, nothing paid
    monkeypatch.delenv("NOBODYS_KEY")
    with pytest.raises(
        PlanError, match=r"nothing was started, for this is missing: .*NOBODYS_KEY is not set"
    ):
        planning.checked_plan(Study(store, profile), 1)


def test_the_reward_model_is_planned(tmp_path):
    tiny = tiny_config("gemma", 32)
    AutoModelForCausalLM.from_config(tiny).save_pretrained(tmp_path / "gemma")
    settings = SMOKE.reward_model.model_copy(update={"backbone": str(tmp_path / "gemma")})
    profile = with_judges().model_copy(update={"reward_model": settings})
    row = (
        planning.planned(Study(RunStore(tmp_path / "store"), profile, 0)).set_index("run").loc["reward model"]
    )
    assert row["steps"] == -(-SMOKE.reward_data.train_pairs // settings.batch_size)
    assert row["state"] == "to do" and row["gigabytes"] > 0 and row["calls"] == 0


def test_no_more_prompts_are_counted_than_a_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "prompts_of", lambda data, count: ("one", "two", "three"))
    counted = planning._counts(with_judges(data="prompts.jsonl"), Condition("qwen2", "judge-b").start)
    assert counted["responses"] == 3 * SMOKE.policies.evaluation.samples * SMOKE.policies.count


def test_time_is_never_less_than_the_longest_runs():
    assert planning._seconds(pd.Series([3600.0, 7200.0, 3600.0]), 2) == 7200
    assert planning._seconds(pd.Series([36000.0, 7200.0]), 8) == 36000


def test_time_is_said_as_people_say_it():
    said = [planning._time(value) for value in (0.4572, 110, 600, 9000, 259200)]
    assert said == ["0.457 seconds", "110 seconds", "10 minutes", "2.5 hours", "3 days"]


def test_the_command(tmp_path, capsys):
    assert main(["plan", "--profile", "smoke", "--run-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "together: " in told and "0 paid calls" in told
