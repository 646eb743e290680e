"""Reference policies: they learn the corpus through trl, are saved, and sample repeatably."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vaalign_lib.data.world.language import WORDS
from vaalign_lib.data.world.world import World
from vaalign_lib.models import ARCHITECTURES, load_tokenizer, tiny_config
from vaalign_lib.policies.reference import sample, write_reference

WORLD = World(0)
SIZES = {"width": 16, "responses": 1500, "batch_size": 32, "learning_rate": 1e-2, "seed": 0}


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_reference(folder, world_seed=0, architecture=request.param, epochs=4, **SIZES)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_configurations_are_tiny_models_of_their_architecture(architecture):
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, 16))
    assert architecture in type(model).__name__.lower()
    assert sum(p.numel() for p in model.parameters()) < 30_000
    assert model.config.vocab_size == len(WORDS)


def test_training_learns_to_speak(trained):
    model, tokenizer = trained
    prompts = WORLD.prompts(120, np.random.default_rng(0))
    untrained = AutoModelForCausalLM.from_config(model.config).eval()
    coherence = [
        WORLD.assess(prompts, sample(m, tokenizer, prompts, seed=0))["coherence"].mean()
        for m in (untrained, model)
    ]
    assert coherence[0] < 0.5 and coherence[1] > 1.5
    assert set(" ".join(sample(model, tokenizer, prompts, seed=0)).split()) <= set(WORDS)


def test_sampling_repeats_itself_and_keeps_to_its_seed(trained):
    model, tokenizer = trained
    prompts = WORLD.prompts(20, np.random.default_rng(1))
    state = torch.random.get_rng_state()
    one, two, other = (
        sample(model, tokenizer, prompts, seed=s, temperature=1.5, top_k=50) for s in (1, 1, 2)
    )
    assert one == two != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_only_the_response_counts_in_the_loss(tmp_path):
    from vaalign_lib.data.world.tokenizer import world_tokenizer
    from vaalign_lib.policies.reference import _supervised

    data = _supervised(world_tokenizer(), ["describe the drum ?"], ["the drum is soft ."])
    assert data["completion_mask"][0] == [0] * 5 + [1] * 6  # prompt and separator; response and end


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="expected one of gpt2, qwen2, mistral, gemma, got 'rnn'"):
        tiny_config("rnn", 16)
