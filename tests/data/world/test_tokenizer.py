"""The world's tokenizer: one id per word, the same as in the world's own arrays."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from vaalign_lib.data.world import language
from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.models import ARCHITECTURES, conversation_ids, load_tokenizer, prompt_ids, tiny_config


def test_saved_to_disk_it_is_an_ordinary_fast_tokenizer_with_the_worlds_ids(tmp_path):
    world_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and len(tokenizer) == len(language.WORDS)
    _, responses = World(0).corpus(50, np.random.default_rng(0))
    for response, row in zip(responses, language.encode(responses, 31), strict=True):
        assert tokenizer(response)["input_ids"] == row[row != language.PAD_ID].tolist()
        assert tokenizer.decode(tokenizer(response)["input_ids"]) == response


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beside_a_model_of_any_architecture_it_stays_itself(tmp_path, architecture):
    tiny_config(architecture, 16).save_pretrained(tmp_path)
    world_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "the drum is soft ."
    assert tokenizer(text)["input_ids"] == [language.INDEX[word] for word in text.split()]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_conversation_is_prompt_separator_response_end():
    tokenizer = world_tokenizer()
    prompt, response = "describe the drum now ?", "the drum is soft ."
    whole = conversation_ids(tokenizer, [prompt], [response], 64)[0]
    words = f"{prompt} {language.SEPARATOR} {response} {language.EOS}".split()
    assert whole == [language.INDEX[word] for word in words]
    assert whole[: len(prompt_ids(tokenizer, [prompt], 64)[0])] == prompt_ids(tokenizer, [prompt], 64)[0]
    assert conversation_ids(tokenizer, [prompt], [response], 8)[0] == whole[-8:]
