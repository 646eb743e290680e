"""What a stack writes, and what it says about it."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.policies.conftest import END, PAD, WORDS
from tests.policies.test_stack import ROWS, batch, disturb, separate, separate_logits
from vaalign_lib.policies.sampling import (
    Prompts,
    _draw,
    response_states,
    rollout,
    sequences,
    token_log_probabilities,
)
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Sampling

SETTINGS = Sampling(temperature=1.3, top_k=9, top_p=0.8, min_new_tokens=3, max_new_tokens=9,
                    log_probability_temperature=1.3)  # fmt: skip


def write(stack, settings=SETTINGS, seed=3):
    rows, _, prompts = batch(stack.size)
    random = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(rows), settings.max_new_tokens, generator=random)
    return rollout(stack, prompts, uniforms, settings, END, PAD), uniforms, rows


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (5, 1.0, 1.5), (0, 0.7, 0.8), (9, 0.6, 1.5)]
)
def test_draws_have_the_distribution_that_transformers_warps(top_k, top_p, temperature):
    logits = 2 * torch.randn(4, WORDS, generator=torch.Generator().manual_seed(0))
    warped = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(1)
    count = 20_000
    uniforms = (torch.arange(count) + 0.5) / count  # evenly spread: frequencies without noise
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for row in range(4):
        drawn = _draw(logits[row].expand(count, -1), uniforms, settings, barred=None)
        frequency = torch.bincount(drawn, minlength=WORDS) / count
        assert (frequency - expected[row]).abs().max() < 2 / count


def test_a_barred_token_never_comes_and_the_others_share_its_mass():
    logits = torch.tensor([[5.0, 1.0, 0.0]]).expand(1000, -1)
    uniforms = (torch.arange(1000) + 0.5) / 1000
    drawn = _draw(logits, uniforms, Sampling(temperature=1.0, top_p=1.0), barred=0)
    frequency = torch.bincount(drawn, minlength=3) / 1000
    torch.testing.assert_close(frequency, torch.tensor([0.0, 0.7311, 0.2689]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_tokens_that_may_come(uniform):
    logits = torch.randn(50, WORDS, generator=torch.Generator().manual_seed(1))
    settings = Sampling(temperature=1.0, top_k=4, top_p=0.5)
    drawn = _draw(logits, torch.full((50,), uniform), settings, barred=None)
    allowed = TopPLogitsWarper(0.5)(None, TopKLogitsWarper(4)(None, logits)).isfinite()
    assert allowed.gather(1, drawn[:, None]).all()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "mistral-untied"])
def test_log_probabilities_and_states_are_those_of_one_pass_over_the_whole(kind, saved):
    stack = PolicyStack(saved(kind), 3)
    disturb(stack)
    written, _, _ = write(stack)
    joined = sequences(written.prompts, written.responses, torch.float32)
    states = response_states(stack, joined)
    logits = stack.logits(states)
    whole = token_log_probabilities(logits, written.responses, 1.3)
    mask = written.mask
    torch.testing.assert_close(written.log_probabilities[mask], whole[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(written.hidden[mask], states[mask], atol=1e-4, rtol=1e-4)
    share = (logits / 1.3).softmax(-1)
    entropy = -(share * share.log()).sum(-1)
    torch.testing.assert_close(written.entropy[mask], entropy[mask], atol=1e-4, rtol=1e-4)


def test_every_token_is_the_one_that_a_separate_model_draws(saved, tmp_path):
    stack = PolicyStack(saved("qwen2"), 3)
    disturb(stack)
    written, uniforms, rows = write(stack)
    for j in range(3):
        part = slice(j * ROWS, (j + 1) * ROWS)
        model = separate(stack, j, tmp_path / f"out-{j}")
        logits = separate_logits(model, rows[part], torch.nn.functional.pad(written.responses[part], (0, 0)))
        for step in range(SETTINGS.max_new_tokens):
            barred = END if step < SETTINGS.min_new_tokens else None
            place = step - SETTINGS.max_new_tokens
            if logits.shape[1] + place < 0:
                continue
            alone = _draw(logits[:, place], uniforms[part, step], SETTINGS, barred)
            going = written.mask[part, step]
            assert torch.equal(alone[going], written.responses[part, step][going])


def test_responses_end_once_and_not_too_soon(saved):
    stack = PolicyStack(saved("gpt2"), 3)
    disturb(stack)
    with torch.no_grad():
        end = stack.model.get_output_embeddings().weight
        end[:, END] = 3 * end.mean(1)  # an end that comes about as often as other words
    written, _, _ = write(stack)
    for row, real in zip(written.responses, written.mask, strict=True):
        length = int(real.sum())
        assert real[:length].all() and not real[length:].any()
        assert (row[length:] == PAD).all()
        ends = (row == END).nonzero()[:, 0].tolist()
        assert ends in ([], [length - 1])
        assert length >= SETTINGS.min_new_tokens + bool(ends)
    assert not written.log_probabilities[~written.mask].isnan().any()
    assert torch.equal(written.lengths, written.mask.sum(1))


def test_without_a_minimum_length_a_response_may_be_its_end(saved):
    stack = PolicyStack(saved("gpt2"), 1)
    with torch.no_grad():
        bias = stack.model.transformer.ln_f.bias
        bias += 500 * stack.model.lm_head.weight[:, END]  # the end is all but certain
    free = SETTINGS.model_copy(update={"min_new_tokens": 0})
    written, _, _ = write(stack, free)
    assert (written.lengths == 1).all()
    assert written.responses.shape[1] == free.max_new_tokens  # whatever stopped first


def test_shapes_do_not_depend_on_when_the_last_response_ends(saved):
    stack = PolicyStack(saved("gpt2"), 2)
    written, _, _ = write(stack)
    tokens = SETTINGS.max_new_tokens
    assert written.log_probabilities.shape == written.entropy.shape == (2 * ROWS, tokens)
    assert written.hidden.shape == (2 * ROWS, tokens, 16)


def test_prompts_are_aligned_at_their_ends():
    prompts = Prompts.from_lists([[5, 6], [7, 8, 9]], 4, PAD)
    assert prompts.ids.tolist() == [[PAD, PAD, 5, 6], [PAD, 7, 8, 9]]
    assert prompts.real.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert sequences(prompts, torch.tensor([[2, 3], [4, 1]]), torch.float32).positions.tolist() == [
        [0, 0, 0, 1, 2],
        [0, 0, 1, 2, 3],
    ]
    with pytest.raises(ValueError, match="1 to 2 tokens, got 2 to 3"):
        Prompts.from_lists([[5, 6], [7, 8, 9]], 2, PAD)
