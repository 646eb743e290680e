"""The embedded world's vocabulary as an ordinary fast tokenizer of transformers."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vaalign_lib.data.world.language import EOS, INDEX, PAD, SEPARATOR, UNKNOWN

# A conversation is: prompt, separator, response, end.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'user' %} " + SEPARATOR + " {% else %} " + EOS + "{% endif %}"
    "{% endfor %}"
)


def world_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer; `save_pretrained` puts it beside a model."""
    core = Tokenizer(models.WordLevel(INDEX, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=None,
        unk_token=UNKNOWN,
        additional_special_tokens=[SEPARATOR],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
