"""Adapters in upper layers: what frozen layers make of a token is computed once, and nothing else changes."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from tests.policies.conftest import END, PAD, WORDS
from tests.policies.test_stack import ROWS, TOKENS, assert_near, batch, disturb, separate_logits
from tests.small_problem import TableReward, tokenizer
from vaalign_lib.policies import sampling
from vaalign_lib.policies.checks import StackError
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import Prompts, response_states, rollout, sequences
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Sampling
from vaalign_lib.training.evaluation import divergences
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.ppo import Trainer

LAYERS, FROZEN, PROMPT = 4, 2, 9
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "qwen2": ["q_proj", "v_proj", "down_proj"],
           "llama": ["q_proj", "k_proj", "o_proj", "gate_proj"],
           "mistral": ["v_proj", "up_proj"]}  # fmt: skip
KINDS = list(TARGETS)
WHOLE = Sampling(temperature=1.3, top_k=0, top_p=1.0, min_new_tokens=1, max_new_tokens=TOKENS,
                 log_probability_temperature=1.3)  # fmt: skip


def config(kind):
    """Return a configuration of four layers; Qwen2's upper ones see three tokens."""
    shared = {"vocab_size": WORDS, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END}
    if kind == "gpt2":
        return GPT2Config(n_embd=16, n_layer=LAYERS, n_head=2, n_positions=40, **shared)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 40}  # fmt: skip
    if kind == "qwen2":
        return Qwen2Config(**size, **shared, use_sliding_window=True, sliding_window=3, max_window_layers=3)
    return {"llama": LlamaConfig, "mistral": MistralConfig}[kind](**size, **shared)


def lora(kind, layers=(2, 3)):
    return LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[kind], layers_to_transform=list(layers),
                      task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def save(kind):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(kind))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.fixture(params=[False, True], ids=["few words", "many words"])
def many(request, monkeypatch):
    """Take the ways of a large vocabulary, in pieces of a few rows, or those of a small one."""
    if request.param:
        for name, value in {"LARGE": 0, "PIECE": 4, "BLOCK": 5}.items():
            monkeypatch.setattr(sampling, name, value)
    return request.param


def stack_of(kind, folder, reuse=True, size=3, **options):
    stack = PolicyStack(folder, size, lora=lora(kind), **options)
    disturb(stack)
    assert stack.frozen == FROZEN
    stack.frozen = FROZEN if reuse else 0
    return stack


def write(stack, settings=WHOLE):
    """Answer prompts of which some are the same; all begin with three tokens."""
    rows, _, _ = batch(stack.size)
    prompts = Prompts.from_lists([[5, 9, 4, *row] for row in rows], PROMPT, PAD)
    prompts = prompts[torch.arange(len(prompts.ids)).clamp(max=len(prompts.ids) - 3)]
    for seed in range(20):
        uniforms = torch.rand(len(prompts.ids), TOKENS, generator=torch.Generator().manual_seed(seed))
        written = rollout(stack, prompts, uniforms, settings, END, PAD, [0, 1])
        if not written.mask.all():  # padding is covered
            return written
    raise AssertionError("nothing ends")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_reused_is_what_a_whole_pass_makes(kind, folder, many):
    place, found = folder(kind), []
    for reuse in (True, False):
        stack = stack_of(kind, place, reuse)
        reference, written = ReferencePolicy(stack), write(stack)
        assert (written.frozen is not None) == reuse
        if reuse:  # windows count columns, so that beginnings are not taken out under them
            begun = written.frozen.beginning
            assert (begun is None) if kind in ("qwen2", "mistral") else begun.shape[1] >= 3
        joined = sequences(written.prompts, written.responses, torch.float32, written.frozen)
        states = reference.all_states(joined, [0, 1, 3, 4])
        scores = reference.log_probabilities(joined, 1.3, states[-1])
        alone = reference.log_probabilities(joined, 1.3)
        own = response_states(stack, joined)
        measured = divergences(stack, reference, written, 1.3)
        rest = written.log_probabilities, written.entropy, written.hidden
        found.append((written, [*states, scores, alone, own, *rest], measured))
    (with_reuse, ours, kl), (without, theirs, other) = found
    assert torch.equal(with_reuse.responses, without.responses) and with_reuse.mask.any(1).all()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one[with_reuse.mask], two[with_reuse.mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kl, other, atol=1e-5, rtol=1e-5)
    assert (kl > 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradients_are_those_of_peft_alone(kind, folder, many, tmp_path):
    place = folder(kind)
    stack = stack_of(kind, place)
    written = write(stack)
    joined = sequences(written.prompts, written.responses, torch.float32, written.frozen)
    scores = stack.scored(response_states(stack, joined), joined.responses, 1.3)
    weight = torch.linspace(-1, 1, scores.numel()).view(scores.shape) * written.mask
    (scores * weight).sum().backward()
    for j in range(stack.size):
        stack.export(j, tmp_path / f"out-{j}")
        base = AutoModelForCausalLM.from_pretrained(place)
        model = PeftModel.from_pretrained(base, tmp_path / f"out-{j}", is_trainable=True)
        part = slice(j * ROWS, (j + 1) * ROWS)
        rows = zip(joined.ids[part, :PROMPT], written.prompts.real[part], strict=True)
        prompts = [row[real].tolist() for row, real in rows]
        logits = separate_logits(model, prompts, written.responses[part])
        alone = (logits / 1.3).log_softmax(-1).gather(2, written.responses[part][:, :, None])[..., 0]
        seen = written.mask[part]
        torch.testing.assert_close(scores[part][seen], alone[seen], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(written.log_probabilities[part][seen], alone[seen], atol=2e-5, rtol=1e-5)
        (alone * weight[part]).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(gradients) == len(stack.parameters())
        for name, parameter in stack.parameters().items():
            layer, _, side = name.rpartition(".")
            peft_side = {"down": "lora_A", "up": "lora_B"}[side]
            theirs = gradients[f"base_model.model.{layer}.{peft_side}.default.weight"]
            assert_near(parameter.grad[j].T, theirs)


def trainer_of(kind, place, reuse, **options):
    stack = PolicyStack(place, 2, lora=lora(kind), **options)
    disturb(stack)
    stack.frozen = FROZEN if reuse else 0
    source = TableReward(lambda p, r: 0.3 * len(r) - r.count("7"), lambda p, r: 1.0 + len(p))
    ppo = PPO(iterations=4, batch_size=6, mini_batch_size=3, ppo_epochs=2, learning_rate=3e-3)
    return Trainer(stack, None, tokenizer(WORDS), Task(["5", "6", "7"], source), Method(), ppo, WHOLE,
                   warm_up=12, seed=1)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_reuse_are_steps_without(kind, folder, many):
    place = folder(kind)
    ours, theirs = (trainer_of(kind, place, reuse) for reuse in (True, False))
    start = {name: p.detach().clone() for name, p in ours.stack.parameters().items()}
    log, other = ours.train(2), theirs.train(2)
    for name in log:
        torch.testing.assert_close(
            torch.tensor(log[name]), torch.tensor(other[name]), atol=2e-4, rtol=2e-4, msg=name
        )
    for name, parameter in ours.stack.parameters().items():
        moved = parameter.detach() - start[name]
        other_way = theirs.stack.parameters()[name].detach() - start[name]
        assert (moved - other_way).norm() < 0.02 * moved.norm() and moved.any()


def test_checkpointing_changes_nothing_above_frozen_layers(folder):
    place = folder("llama")
    plain, again = (trainer_of("llama", place, True, gradient_checkpointing=on) for on in (False, True))
    plain.train(1), again.train(1)
    for name, parameter in plain.stack.parameters().items():
        assert torch.equal(parameter, again.stack.parameters()[name])


def test_a_base_in_bfloat16_under_adapters_in_float32(folder, many):
    exact = stack_of("llama", folder("llama"))
    stack = PolicyStack(exact.config.name_or_path, 3, lora=lora("llama"), dtype=torch.bfloat16,
                        precision="bfloat16")  # fmt: skip
    disturb(stack)
    assert all(p.dtype == torch.float32 for p in stack.parameters().values())
    assert {p.dtype for p in stack.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    written, gradients = write(exact), []
    for one in (exact, stack):
        _, responses, prompts = batch(3)
        joined = sequences(prompts, responses, one.dtype)
        scores = one.scored(response_states(one, joined), joined.responses, 1.3)
        (scores * torch.linspace(-1, 1, scores.numel()).view(scores.shape)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters().values()]))
    assert 0 < (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.15
    rounded = write(stack)
    assert rounded.frozen.states[FROZEN].dtype == torch.bfloat16
    joined = sequences(rounded.prompts, rounded.responses, stack.dtype, rounded.frozen)
    whole = stack.scored(response_states(stack, joined), joined.responses, 1.3)
    error = (rounded.log_probabilities - whole)[rounded.mask].abs()
    assert error.max() < 0.2 and written.mask.any()


@pytest.mark.parametrize("layers", [[], [4], [0, -1]])
def test_layers_that_a_model_does_not_have_are_refused(layers, folder):
    with pytest.raises(StackError, match=r"layers_to_transform: expected some of 0 to 3, got \["):
        PolicyStack(folder("llama"), 1, lora=lora("llama", layers))


def test_adapters_from_the_first_layer_on_leave_nothing_frozen(folder):
    stack = PolicyStack(folder("llama"), 1, lora=lora("llama", [0, 3]))
    assert stack.frozen == 0 and write(stack).frozen is None


def test_frozen_states_of_another_model_are_not_taken(folder):
    place = folder("llama")
    one, two = stack_of("llama", place), stack_of("llama", place)
    written = write(one)
    foreign = sequences(written.prompts, written.responses, torch.float32, written.frozen)
    plain = sequences(written.prompts, written.responses, torch.float32)
    assert not written.frozen.of(two.model, {FROZEN})
    assert torch.equal(response_states(two, foreign), response_states(two, plain))


# --- drawing from many words ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [23, 1000])
@pytest.mark.parametrize("barred", [None, 3])
def test_draws_without_sorting_have_the_exact_distribution(words, barred, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 7)
    logits = 2 * torch.randn(3, words, generator=torch.Generator().manual_seed(0))
    settings = Sampling(temperature=0.7, top_k=0, top_p=1.0, log_probability_temperature=1.3)
    expected = (logits / 0.7).index_fill(1, torch.tensor([3] if barred else []).long(), -torch.inf).softmax(1)
    normal = (logits / 1.3).log_softmax(1)
    count = 20_000
    uniforms = (torch.arange(count) + 0.5) / count  # evenly spread: frequencies without noise
    for row in range(3):
        token, chosen, entropy = sampling._draw_of_many(
            logits[row].expand(count, -1), uniforms, settings, barred
        )
        frequency = torch.bincount(token, minlength=words) / count
        assert (frequency - expected[row]).abs().max() < 2 / count
        torch.testing.assert_close(chosen, normal[row][token])
        torch.testing.assert_close(entropy[0], -(normal[row].exp() * normal[row]).sum())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_words_that_may_come(uniform):
    logits = torch.full((1, 600), -torch.inf)
    logits[0, 300:310] = 0.0
    share = logits.softmax(1)
    assert sampling._inverse(share, torch.tensor([uniform])).item() == (300 if uniform == 0 else 309)
    hopeless = torch.full((1, 600), torch.nan)
    assert 0 <= sampling._inverse(hopeless, torch.tensor([uniform])).item() < 600
