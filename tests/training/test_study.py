"""From a profile to policies in training; the paper's three policies on tiny random checkpoints."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config

from tests.small_problem import TableReward, tokenizer
from vaalign_lib.experiments.conditions import METHODS
from vaalign_lib.experiments.results import curves_of
from vaalign_lib.figures.policies import learning_curves
from vaalign_lib.profiles import load_profile
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.run import policy_trainer, write_tensorboard

WORDS = 30
PAPER = load_profile("paper")
PAPER = PAPER.model_copy(update={"policies": PAPER.policies.model_copy(update={"warm_up": 64})})


def checkpoint(folder, architecture):
    """Save a tiny random checkpoint of an architecture as its makers configure it."""
    special = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    like = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    config = {
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **special),
        "qwen2": Qwen2Config(tie_word_embeddings=True, **like, **special),
        "mistral": MistralConfig(tie_word_embeddings=False, **like, **special),
    }[architecture]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(WORDS).save_pretrained(folder)
    return folder


def judged(prompt, response):
    return 40 + 3 * response.split().count("5")


@pytest.fixture
def task():
    source = TableReward(judged, lambda p, r: 75.0)  # width 30, as the prompted judges answer
    return Task(["2", "3 4", "7 8 9"], source)


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("gpt2", "vanilla"),
        ("gpt2", "variance_aware"),
        ("qwen2", "variance_aware"),
        ("mistral", "variance_aware"),
    ],
)
def test_the_papers_policies_take_two_steps(architecture, objective, task, tmp_path):
    folder = checkpoint(tmp_path / "base", architecture)
    method = Method(objective, credit="token", standardized=False)  # the regime `as_printed`
    one = policy_trainer(PAPER, architecture, folder, task, method, policies=[0, 1], device="cpu")
    start = [p.detach().clone() for p in one.stack.parameters().values()]
    log = one.train(2)
    settings = PAPER.policies.training[architecture].settings(objective)
    assert one.settings == settings and one.settings.iterations > 2
    assert log["step"].max() == 2 and log.notna().all().all()
    moved = max((p - q).abs().max() for p, q in zip(one.stack.parameters().values(), start, strict=True))
    assert 0 < moved <= 4 * settings.learning_rate * 2 * settings.ppo_epochs * settings.batch_size
    one.stack.export(1, tmp_path / "out", one.tokenizer)
    if architecture == "mistral":
        assert one.stack.lora is not None and one.stack.dtype == torch.bfloat16
        assert {type(m).__name__ for m in one.stack.model.modules()} >= {"Linear4bit"}
        assert all(p.shape[-1] == 128 or p.shape[1] == 128 for p in one.stack.parameters().values())
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out")
    else:
        assert one.stack.lora is None
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_paper_profile_holds_what_the_tables_print():
    gpt2, qwen, mistral = (PAPER.policies.training[k] for k in ("gpt2", "qwen2", "mistral"))
    vanilla, aware = gpt2.settings("vanilla"), gpt2.settings("variance_aware")
    assert (vanilla.learning_rate, vanilla.init_kl_coef) == (1.414e-5, 0.2)  # Table 9
    assert (aware.learning_rate, aware.init_kl_coef) == (1.5e-5, 0.05)  # Table 10
    assert gpt2.settings("uwo") == vanilla
    assert vanilla.adaptive_kl is None and vanilla.iterations * vanilla.batch_size == 24_576
    assert qwen.settings("variance_aware") == qwen.settings("vanilla")  # Table 12, both variants
    assert (qwen.ppo.learning_rate, qwen.ppo.mini_batch_size) == (3.14e-9, 4)
    assert mistral.ppo.cliprange_value == 0.5 and mistral.ppo.vf_coef == 0.3  # Table 13
    assert mistral.lora is not None and mistral.lora.lora_dropout == 0.05  # Table 16
    for one in (qwen.ppo, mistral.ppo):
        assert one.adaptive_kl is not None
        assert (one.adaptive_kl.target, one.adaptive_kl.horizon) == (0.7, 19)
    assert PAPER.policies.sampling.log_probability_temperature == 1.0


def test_adapters_start_from_the_study_seed_and_the_policy(task, tmp_path):
    folder = checkpoint(tmp_path / "base", "mistral")
    smoke = load_profile("smoke")
    first, second, other = (
        policy_trainer(smoke, "mistral", folder, task, Method(), policies=p, seed=s, device="cpu")
        for p, s in (([3, 4], 0), ([4, 9], 0), ([4, 9], 1))
    )
    name = next(n for n in first.stack.parameters() if n.endswith("down"))
    starts = [one.stack.parameters()[name] for one in (first, second, other)]
    assert torch.equal(starts[0][1], starts[1][0])
    assert not torch.equal(starts[1][0], starts[2][0])


def test_an_unknown_architecture_is_named(task):
    with pytest.raises(ValueError, match=r"paper has gpt2, qwen2, mistral, not gpt3"):
        policy_trainer(PAPER, "gpt3", "nowhere", task, Method())


def test_logs_become_tensorboard_runs_and_curves(task, tmp_path):
    folder = checkpoint(tmp_path / "base", "gpt2")
    smoke = load_profile("smoke")
    log = policy_trainer(smoke, "gpt2", folder, task, Method(), policies=[5, 7], device="cpu").train()
    write_tensorboard(log, tmp_path / "board")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = events.EventAccumulator(str(tmp_path / "board" / "policy-7"))
    reader.Reload()
    rows = log[log["policy"] == 7]
    values = [(event.step, event.value) for event in reader.Scalars("kl")]
    np.testing.assert_allclose(values, rows[["step", "kl"]].to_numpy(), atol=1e-6)
    figure = learning_curves(dict.fromkeys(METHODS, curves_of(log)), ["reward", "log_ratio"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "reward, SDs of the reference",
        "log ratio, as trl logs it, nats",
    ]
    assert len(figure.axes[0].lines) == 2
    assert figure.axes[0].lines[0].get_color() != figure.axes[0].lines[1].get_color()
