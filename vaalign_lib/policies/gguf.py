"""A quantized model in llama.cpp's format as an ordinary folder: safetensors, configuration, tokenizer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_OF_THE_FILE = ("quantization_config", "_name_or_path")  # of a configuration that goes on without it


@contextmanager
def importable(wheel: Path) -> Iterator[None]:
    """Let a wheel of pure Python be imported for a while without installing it."""
    sys.path.insert(0, str(wheel))
    try:
        yield
    finally:
        sys.path.remove(str(wheel))


def write_dequantized(folder: Path, gguf_file: Path, reader: Path) -> None:
    """Write a model of a GGUF file, its weights in float32, with its tokenizer and chat template.

    `reader` is the wheel of the package `gguf`, by which transformers reads the file.
    """
    with importable(reader):
        named = {"gguf_file": gguf_file.name, "local_files_only": True}
        read = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **named)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **named)
    config = read.config
    for name in _OF_THE_FILE:
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):  # one that was read from GGUF refuses to be saved
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
