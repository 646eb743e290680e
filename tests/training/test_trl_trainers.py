"""The variance-aware trainers against TRL's own, against the formula by hand, and where they converge."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig
from trl import GRPOTrainer, RLOOTrainer

from tests.small_problem import TableReward, tokenizer
from tests.trl_problem import KINDS, WORDS, equal, make, rewards_of, start, uneven, weights
from vaalign_lib.experiments.trl import VARIANTS as VARIANTS_ON_ONE_TOKEN
from vaalign_lib.theory.tabular import exact_policy, grpo_fixed_point, ppo_fixed_point
from vaalign_lib.training.one_token import BETA, one_token_problem
from vaalign_lib.training.trl import (
    VARIANCE,
    IncompatibleTrlError,
    VarianceError,
    _Weighing,
    check_columns,
    checked_variances,
    reward_function,
    summed,
)
from vaalign_lib.training.trl_runs import one_token_shares

VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "several iterations": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "one generation for two steps": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
}


# --- equal variances: the stock trainers, bit by bit --------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_constant_variance_gives_the_stock_trainer(kind, variant, tmp_path):
    ends = []
    for stock in (True, False):
        one = make(kind, tmp_path, stock=stock, **VARIANTS[variant])
        before = weights(one)
        one.train()
        ends.append(weights(one))
        assert not equal(before, ends[-1])
    assert equal(*ends)
    other = make(kind, tmp_path, reward=rewards_of(uneven), **VARIANTS[variant])
    other.train()
    assert not equal(weights(other), ends[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("four_bit", [False, True])
def test_adapters_over_a_frozen_base(kind, four_bit, tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = MistralConfig(vocab_size=WORDS, **small, **special)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer(WORDS).save_pretrained(tmp_path / "base")
    options = {"model_init_kwargs": {"dtype": "float32"}}
    if four_bit:
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        options["model_init_kwargs"]["quantization_config"] = quantized
    ends = []
    for stock, variance in ((True, None), (False, lambda ids: 1.0), (False, uneven)):
        one = make(
            kind, tmp_path, stock=stock, reward=rewards_of(variance or uneven),
            model=str(tmp_path / "base"),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            **options,
        )  # fmt: skip
        torch.manual_seed(1)
        one.train()
        ends.append(weights(one))
    assert all("lora" in name for name in ends[0])
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


# --- the formula by hand ------------------------------------------------------------------------------


def log_probabilities(model, batch):
    """Return the log-probabilities of the completions' tokens, by a plain pass."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    logits = model(input_ids=ids, attention_mask=mask).logits
    width = batch["completion_ids"].shape[1]
    shares = logits[:, -width - 1 : -1].log_softmax(-1)
    return shares.gather(2, batch["completion_ids"][:, :, None])[:, :, 0]


def moved(kind, folder, **options):
    """Return a trainer whose policy has left the reference, and a batch of it with what is known."""
    one = make(kind, folder, reward=rewards_of(uneven), **options)
    one.train()
    one.model.train()
    asked = [{"prompt": str(2 + k // 4)} for k in range(8)]
    torch.manual_seed(5)
    batch = one._generate_and_score_completions(asked)
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    reward = torch.tensor([float(sum(row)) for row in rows])
    variance = torch.tensor([uneven(row) for row in rows])
    assert variance.unique().numel() > 3
    reference = AutoModelForCausalLM.from_pretrained(folder / "start")
    with torch.no_grad():
        ratio = log_probabilities(one.model, batch) - log_probabilities(reference, batch)
    return one, batch, reward, variance, ratio * batch["completion_mask"]


def left_out(values):
    """Return each value less the mean of the other three of its group."""
    groups = values.view(-1, 4)
    return (groups - (groups.sum(1, keepdim=True) - groups) / 3).view(-1)


@pytest.mark.parametrize("penalty", ["detached", "exact"])
def test_advantages_of_rloo_by_hand(penalty, tmp_path):
    one, batch, reward, variance, ratio = moved("rloo", tmp_path, penalty=penalty)
    kl = ratio.sum(1)
    assert kl.abs().min() > 1e-3
    shaped = reward - 0.3 * variance * (kl + (penalty == "exact"))
    torch.testing.assert_close(batch["advantages"], left_out(shaped), atol=1e-4, rtol=1e-4)
    assert type(one.beta) is float and one.beta == 0.3


@pytest.mark.parametrize("corrected", [False, True])
def test_the_loss_of_grpo_by_hand(corrected, tmp_path):
    options = {"loss_type": "grpo", "use_bias_correction_kl": corrected, "scale_rewards": "none"}
    one, batch, reward, variance, ratio = moved("grpo", tmp_path, **options)
    centred = (reward.view(-1, 4) - reward.view(-1, 4).mean(1, keepdim=True)).view(-1)
    torch.testing.assert_close(batch["advantages"], centred, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch[VARIANCE], variance)
    order = torch.tensor([5, 2, 7, 0])  # rows are shuffled and split before they get here
    part = {
        name: value[order] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in batch.items()
    }
    loss = one._compute_loss(one.model, part)
    mine = torch.autograd.grad(loss, list(one.model.parameters()), allow_unused=True)
    now = log_probabilities(one.model, part)
    weight = torch.exp(now - now.detach())  # the ratio to the old policy: 1, but not its gradient
    apart = now - (now.detach() - ratio[order])
    kl = (torch.expm1(-apart) + apart) * (weight if corrected else 1)
    penalized = -weight * part["advantages"][:, None] + 0.3 * variance[order][:, None] * kl
    mask = part["completion_mask"]
    by_hand = ((penalized * mask).sum(1) / mask.sum(1)).mean()
    theirs = torch.autograd.grad(by_hand, list(one.model.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    for ours, other in zip(mine, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-3)
    assert type(one.beta) is float and one.beta == 0.3


def test_the_exact_penalty_of_grpo_is_paid_by_advantages(tmp_path):
    options = {"use_bias_correction_kl": True, "scale_rewards": "group", "penalty": "exact"}
    _, batch, reward, variance, _ = moved("grpo", tmp_path, **options)
    groups, spread = reward.view(-1, 4), variance.view(-1, 4)
    scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    others = (spread.sum(1, keepdim=True) - spread) / 3
    paid = scaled - 0.3 * (spread - others)  # in the units of the loss
    torch.testing.assert_close(batch["advantages"], paid.view(-1), atol=1e-5, rtol=1e-5)


def bonus(completions, **_):
    """Reward every completion, also what the other function could not judge."""
    return [0.25 * len(one) for one in completions]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", ["detached", "exact"])
@pytest.mark.parametrize("others", [[], [bonus]])
def test_what_could_not_be_judged_is_left_out(kind, penalty, others, tmp_path):
    def reward(prompts, completions, completion_ids, log_extra, **_):
        log_extra(VARIANCE, [None if k % 4 == 1 else uneven(v) for k, v in enumerate(completion_ids)])
        return [None if k % 4 == 1 else k + 0.1 * k * k for k in range(len(completion_ids))]

    one = make(kind, tmp_path, reward=[reward, *others], penalty=penalty)
    one.model.train()
    batch = one._generate_and_score_completions([{"prompt": str(2 + k // 4)} for k in range(8)])
    zero = batch["advantages"] == 0
    assert zero.tolist() == [False, True, False, False] * 2
    one.train()
    assert all(p.isfinite().all() for p in weights(one).values())


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_could_be_judged_nothing_is_learned(kind, tmp_path):
    def silent(completions, log_extra, **_):
        log_extra(VARIANCE, [None] * len(completions))
        return [None] * len(completions)

    one = make(kind, tmp_path, reward=[silent, bonus], max_steps=1)
    before = weights(one)
    one.train()
    assert equal(before, weights(one))


@pytest.mark.parametrize("kind", KINDS)
def test_alone_in_its_group_a_completion_has_nobody_to_be_compared_with(kind, tmp_path):
    def reward(completions, completion_ids, log_extra, **_):
        known = [0, 4, 6]  # one of the first four, two of the others
        log_extra(VARIANCE, [2.0 + k if k in known else None for k in range(8)])
        return [1.0 + k if k in known else None for k in range(8)]

    options = {"scale_rewards": "none"} if kind == "grpo" else {}
    one = make(kind, tmp_path, reward=reward, penalty="exact", **options)
    one.model.train()
    batch = one._generate_and_score_completions([{"prompt": str(2 + k // 4)} for k in range(8)])
    # rewards 5 and 7, variances 6 and 8; RLOO compares with the other, GRPO with the mean of both
    gain, excess = (2.0, 2.0) if kind == "rloo" else (1.0, 2.0)
    second = gain - 0.3 * excess
    by_hand = torch.tensor([0, 0, 0, 0, -second, 0, second, 0])
    torch.testing.assert_close(batch["advantages"], by_hand, atol=1e-4, rtol=0)


def test_of_two_functions_the_variances_add():
    first, second = [1.0, 2.0, None], [10.0, None, None]
    assert summed(first + second, 3, [1.0, 1.0]) == [11.0, None, None]
    assert summed(first, 3, [1.0, 0.5]) == first  # of the whole reward
    for logged in (first + second[:1], first * 3, None):  # for checked_variances to refuse
        assert summed(logged, 3, [1.0, 1.0]) == logged
    with pytest.raises(VarianceError, match=r"which have the weights \[1.0, 0.5\]"):
        summed(first + second, 3, [1.0, 0.5])


def test_two_sources_beside_each_other(tmp_path):
    sources = [
        TableReward(lambda p, r: len(r), lambda p, r: 1 + r.count("2"), still=True),
        TableReward(lambda p, r: -r.count("3"), lambda p, r: 2.0, still=True),
    ]
    both = [reward_function(one, name=name) for one, name in zip(sources, "ab", strict=True)]

    def alone(completions, log_extra, **_):
        log_extra(VARIANCE, [3.0 + r.count("2") for r in completions])
        return [float(len(r) - r.count("3")) for r in completions]

    ends = []
    for reward in (both, [alone]):
        one = make("grpo", tmp_path, reward=reward, log_completions=True, max_steps=2)
        one.train()
        ends.append(weights(one))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-5, rtol=1e-4)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bad", "told"), [(float("nan"), "has nan"), (-0.5, "has -0.5"), (float("inf"), "has inf")]
)
def test_a_variance_that_is_none_is_refused(kind, bad, told, tmp_path):
    one = make(kind, tmp_path, reward=rewards_of(lambda ids: bad))
    for _ in range(2):  # and the second time alike
        with pytest.raises(VarianceError, match=f"completion 0 of 8 {told}; expected a finite"):
            one.train()


def test_missing_and_surplus_variances_are_refused(tmp_path):
    with pytest.raises(VarianceError, match="no reward function logged it"):
        make("rloo", tmp_path, reward=lambda completions, **_: [0.0] * len(completions)).train()
    with pytest.raises(VarianceError, match="one for each of 2 completions, got 4"):
        checked_variances([1.0] * 4, [True, True])
    assert checked_variances([1.0, None], [True, False]) == [1.0, None]
    assert checked_variances([1.0, None], [True, True]) == [1.0, None]  # left out
    assert checked_variances([None], [True]) == [None]
    for bad in (1e39, 2e18, "1.0", True, [1.0], -1e-9):
        with pytest.raises(VarianceError, match=r"completion 1 of 2 has .* from 0 to 1e"):
            checked_variances([1.0, bad], [True, True])


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_do_not_fit_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"args\.beta: .* above 0, got 0\.0"):
        make(kind, tmp_path, beta=0.0)
    with pytest.raises(ValueError, match="penalty: expected one of detached, exact, got 'other'"):
        make(kind, tmp_path, penalty="other")
    if kind == "grpo":
        with pytest.raises(ValueError, match="set use_bias_correction_kl=True"):
            make(kind, tmp_path, penalty="exact", use_bias_correction_kl=False)


def test_a_column_with_a_name_of_trls_is_refused():
    data = Dataset.from_dict({"prompt": ["a"], "completions": ["b"]})
    for given in (data, {"one": data}, data.to_iterable_dataset()):
        with pytest.raises(ValueError, match="train_dataset: the column completions has the name"):
            check_columns("train_dataset", given)
    check_columns("eval_dataset", None)
    check_columns("eval_dataset", data.remove_columns("completions"))


def test_a_release_that_does_not_multiply_is_told(tmp_path, monkeypatch):
    rloo, grpo = (make(kind, tmp_path) for kind in ("rloo", "grpo"))
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: torch.zeros(1))
    with pytest.raises(IncompatibleTrlError, match=r"GRPOTrainer\._compute_loss multiplies .* 0 times"):
        grpo.train()

    def generate(self, inputs):
        self._calculate_rewards(inputs, ["2"] * 8, [""] * 8, [[2]] * 8)
        return {}

    monkeypatch.setattr(RLOOTrainer, "_generate_and_score_completions", generate)
    with pytest.raises(IncompatibleTrlError, match=r"RLOOTrainer\._generate_and_score_completions"):
        rloo.train()
    for kind, one in (("rloo", rloo), ("grpo", make("grpo", tmp_path))):  # rewards got otherwise
        monkeypatch.setattr(KINDS[kind][1], "_generate_and_score_completions", lambda *_: {"advantages": [0]})
        with pytest.raises(IncompatibleTrlError, match="gets no rewards from _calculate_rewards"):
            one.train()
        assert type(one.beta) is float


def test_a_product_with_something_else_is_told():
    weights = torch.ones(4)
    for other in (torch.ones(1, 10), torch.ones(3, 10), torch.ones(4), torch.tensor(1.0)):
        with pytest.raises(IncompatibleTrlError, match="not by one with 2 axes and 4 rows"):
            _Weighing(0.5, weights, axes=2) * other
    assert _Weighing(0.5, weights, axes=2) * 2.0 == 1.0
    assert (torch.ones(4, 3) * 2 == 2 * (_Weighing(1.0, weights, axes=2) * torch.ones(4, 3))).all()


# --- several processes, resumed runs ------------------------------------------------------------------


def test_two_processes_keep_each_rows_variance(tmp_path):
    from tests import two_trl_processes

    start(tmp_path / "model")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    module = ["--module", two_trl_processes.__name__, str(tmp_path)]
    done = subprocess.run([*launch, *module], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-9000:]
    assert done.stdout.count("all rows kept their variances") == 4  # two trainers, two processes
    assert done.stdout.count("the stock trainer's weights") == 4
    assert done.stdout.count("a silent process") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_a_run_ends_as_if_it_had_not_been_stopped(kind, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
    whole = make(kind, tmp_path / "whole", reward=rewards_of(uneven), **options)
    whole.train()
    again = make(kind, tmp_path / "again", reward=rewards_of(uneven), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert equal(weights(whole), weights(again))


# --- where they converge ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS_ON_ONE_TOKEN, ids=lambda one: one.name)
def test_on_one_token_each_converges_to_its_fixed_point(variant):
    """At four completions to a prompt, where GRPO's coefficient acts as if it were a third larger."""
    before, after = one_token_shares(variant, seed=4, steps=160, generations=4)
    problem = (*one_token_problem(4), before, BETA)
    found = {
        solve.__name__: 0.5 * np.abs(after - solve(*problem)).sum()
        for solve in (ppo_fixed_point, grpo_fixed_point, exact_policy)
    }
    mine = found.pop(variant.solution.__name__)
    assert mine < 0.03 and mine < 0.35 * min(found.values())
