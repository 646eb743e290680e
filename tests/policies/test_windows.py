"""Sliding windows: stack, reference, writing and PPO see what the plain transformers model sees."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from tests.policies.conftest import END, PAD, WORDS
from tests.policies.test_stack import ROWS, batch, disturb, loss, separate, separate_logits
from tests.policies.test_stack import stacked_logits as logits_of
from tests.small_problem import TableReward, tokenizer
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import rollout, sequences, token_log_probabilities
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Sampling
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.ppo import Trainer

LIKE = {"vocab_size": WORDS, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 40, "sliding_window": 4}  # fmt: skip
CONFIGS = {
    "mistral": MistralConfig(**LIKE),  # all layers
    "qwen2": Qwen2Config(**LIKE, use_sliding_window=True, max_window_layers=1),  # all but the first
    "qwen2 without": Qwen2Config(**LIKE),  # which says a window and does not use it
    "llama": LlamaConfig(**LIKE),  # which knows none
}
WINDOWED = ("mistral", "qwen2")
kinds = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture
def folder(kind, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@kinds
def test_logits_and_gradients_of_a_stack_are_the_models(kind, folder, tmp_path):
    stack = PolicyStack(folder, 2, gradient_checkpointing=True)
    disturb(stack)
    rows, responses, prompts = batch(2)  # up to 11 tokens
    with stack.updating([0, 1]):
        logits = logits_of(stack, prompts, responses).split(ROWS)
        torch.stack([loss(one) for one in logits]).sum().backward()
    for j in range(2):
        model = separate(stack, j, tmp_path / f"out-{j}")
        part = slice(j * ROWS, (j + 1) * ROWS)
        alone = separate_logits(model, rows[part], responses[part])
        torch.testing.assert_close(logits[j], alone, atol=3e-5, rtol=1e-4)
        loss(alone).backward()
        for name, weight in model.named_parameters():
            theirs = stack.parameters()[name].grad[j]
            torch.testing.assert_close(theirs, weight.grad, atol=1e-3, rtol=1e-3)
        model.config.sliding_window = 100  # than which no text is longer
        without = separate_logits(model, rows[part], responses[part])
        assert ((without - alone).abs().max() > 0.1) == (kind in WINDOWED)


@kinds
def test_what_is_written_and_what_the_reference_thinks_of_it_are_the_models(kind, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = ReferencePolicy(AutoModelForCausalLM.from_pretrained(folder))
    rows, _, prompts = batch(2)
    uniforms = torch.rand(len(rows), 12, generator=torch.Generator().manual_seed(0))
    how = Sampling(min_new_tokens=12, max_new_tokens=12, log_probability_temperature=1.0)
    for writer in (PolicyStack(folder, 2), reference):
        written = rollout(writer, prompts, uniforms, how, END, PAD)
        joined = sequences(prompts, written.responses, torch.float32)
        thought = reference.log_probabilities(joined, 1.0)
        states = reference.all_states(joined)
        for k, row in enumerate(rows):
            ids = torch.tensor([row + written.responses[k].tolist()[:-1]])
            alone = model(ids, output_hidden_states=True)
            logits = alone.logits[:, -12:]
            plain = token_log_probabilities(logits, written.responses[None, k], 1.0)[0]
            torch.testing.assert_close(written.log_probabilities[k], plain, atol=3e-5, rtol=1e-4)
            torch.testing.assert_close(thought[k], plain, atol=3e-5, rtol=1e-4)
            for ours, theirs in zip(states, alone.hidden_states, strict=True):
                torch.testing.assert_close(ours[k], theirs[0, -12:], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", WINDOWED)
def test_ppo_begins_at_its_reference_with_ratio_one(kind, folder):
    one = Trainer(
        PolicyStack(folder, 2), AutoModelForCausalLM.from_pretrained(folder), tokenizer(WORDS),
        Task(["2", "3"], TableReward(lambda p, r: float(len(r)), lambda p, r: 1.0)), Method(),
        PPO(iterations=1, batch_size=8, mini_batch_size=8, ppo_epochs=1),
        Sampling(min_new_tokens=12, max_new_tokens=12), warm_up=16,
    )  # fmt: skip
    log = one.train()
    assert (log["kl"].abs() < 1e-4).all() and ((log["ratio"] - 1).abs() < 1e-5).all()
