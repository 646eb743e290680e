"""Public reward models' layouts, on tiny files of each: scores by hand, pooling, and what is refused."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from tests.small_problem import trainer
from vaalign_lib.data.world.attributes import ATTRIBUTES
from vaalign_lib.rewards import classifier
from vaalign_lib.rewards.base import Interval, Members, Unit
from vaalign_lib.rewards.classifier import BackboneError
from vaalign_lib.rewards.public_heads import PublicReward
from vaalign_lib.training.objectives import Method

WIDTH, HIDDEN, OBJECTIVES, LEVELS = 16, 12, 19, 7
PROMPTS = ["abc?", "a b", "abc?", "a long one, is it?"]
RESPONSES = ["x.", "hello there. and more of it", "no", ""]
TEMPLATES = {  # as of Llama 3 and of Gemma 2
    "llama": "<s>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma2": "<s>{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}
BEFORE = {
    "llama": "<|start_header_id|>assistant",
    "gemma2": "\n<start_of_turn>model",
}  # follows a prompt's end
SPECIAL = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]


def tokenizer(kind):
    words = ["<pad>", "<s>", "<unk>", *SPECIAL, *"abcdefghijklmnopqrstuvwxyz .,?\n"]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    one = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token=SPECIAL[0],
        additional_special_tokens=SPECIAL,
    )  # fmt: skip
    one.chat_template = TEMPLATES[kind]
    return one


def drawn(**shapes):
    random = torch.Generator().manual_seed(3)
    return {name.replace("__", "."): torch.randn(shape, generator=random) for name, shape in shapes.items()}


def normal_head():
    """URM's, in half precision."""
    head = drawn(
        score__weight=(10, WIDTH), weights__fc__0__weight=(HIDDEN, WIDTH), weights__fc__0__bias=(HIDDEN,),
        weights__fc__2__weight=(HIDDEN, HIDDEN), weights__fc__2__bias=(HIDDEN,),
        weights__fc__4__weight=(5, HIDDEN), weights__fc__4__bias=(5,),
    )  # fmt: skip
    return {name: one.half() for name, one in head.items()}


def gated_head():
    """ArmoRM's: 19 objectives, layers 0 to 3 with biases, a transform that takes verbosity off the others."""
    head = drawn(
        regression_layer__weight=(OBJECTIVES, WIDTH), gating__layers__0__weight=(HIDDEN, WIDTH),
        gating__layers__0__bias=(HIDDEN,), gating__layers__1__weight=(HIDDEN, HIDDEN),
        gating__layers__1__bias=(HIDDEN,), gating__layers__2__weight=(HIDDEN, HIDDEN),
        gating__layers__2__bias=(HIDDEN,), gating__layers__3__weight=(OBJECTIVES, HIDDEN),
        gating__layers__3__bias=(OBJECTIVES,),
    )  # fmt: skip
    transform = torch.eye(OBJECTIVES)
    transform[4] -= torch.linspace(0, 0.9, OBJECTIVES)
    return head | {"gating.logit_scale": torch.tensor([1.3]), "reward_transform_matrix": transform}


def quantile_head(transform=True):
    """QRM's: quantiles of 19 objectives; linear without bias, ReLU, normalization (dropout), ..., linear."""
    head = drawn(
        regression_layer__weight=(OBJECTIVES * LEVELS, WIDTH), gating__layers__0__weight=(HIDDEN, WIDTH),
        gating__layers__4__weight=(HIDDEN, HIDDEN), gating__layers__11__weight=(OBJECTIVES, HIDDEN),
        gating__layers__11__bias=(OBJECTIVES,), reward_transform_matrix=(OBJECTIVES, OBJECTIVES),
    )  # fmt: skip
    for k in (2, 6):
        norm = drawn(weight=(HIDDEN,), bias=(HIDDEN,), running_mean=(HIDDEN,), running_var=(HIDDEN,))
        norm |= {"running_var": norm["running_var"] ** 2 + 0.1, "num_batches_tracked": torch.tensor(9)}
        head |= {f"gating.layers.{k}.{name}": one for name, one in norm.items()}
    if not transform:
        del head["reward_transform_matrix"]
    return head | {"gating.logit_scale": torch.tensor([0.7])}


def save(folder, head, kind="llama", **config):
    """Write a checkpoint as the public ones are: two files of weights, and code of its own."""
    folder.mkdir()
    size = {"vocab_size": len(tokenizer(kind)), "hidden_size": WIDTH, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
            "head_dim": 8}  # fmt: skip
    made = {"llama": LlamaConfig, "gemma2": Gemma2Config}[kind](**size)
    torch.manual_seed(1)
    backbone = AutoModel.from_config(made)
    for weight in backbone.parameters():  # larger than fresh ones, so that scores differ
        torch.nn.init.normal_(weight, std=0.5 if weight.ndim > 1 else 1.0)
    made.save_pretrained(folder)
    path = folder / "config.json"
    own = {
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.Own"},
        "architectures": ["Own"],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own | config))
    (folder / "modeling_custom.py").write_text("raise SystemExit('code of a checkpoint was run')")
    below = {f"model.{name}": one.contiguous() for name, one in backbone.state_dict().items()}
    files = {"model-00001-of-00002.safetensors": below, "model-00002-of-00002.safetensors": head}
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in files.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer(kind).save_pretrained(folder)
    return folder


# --- by hand --------------------------------------------------------------------------------------------


def states_by_hand(folder, kind="llama"):
    """Return the last states (N, d) of whole conversations and of prompts alone, read one at a time."""
    own, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = own.apply_chat_template(turns, tokenize=False)
        for text in (
            whole,
            whole[: whole.rindex(BEFORE[kind])],
        ):  # a causal model's prompt does not see ahead
            ids = torch.tensor([own.convert_tokens_to_ids(own.tokenize(text))])
            found.append(model(ids).last_hidden_state[0, -1].detach().double().numpy())
    return np.array(found[::2]), np.array(found[1::2])


def doubles(head):
    return {name: one.double().numpy() for name, one in head.items()}


def normal_by_hand(head, last):
    """Return the means, variances and weights of attributes (N, 5) each."""
    w = doubles(head)
    told = (last @ w["score.weight"].T).reshape(-1, 5, 2)
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    hidden = last
    for layer in (0, 2, 4):
        hidden = hidden @ w[f"weights.fc.{layer}.weight"].T + w[f"weights.fc.{layer}.bias"]
        if layer < 4:
            hidden = scale * np.where(hidden > 0, hidden, alpha * np.expm1(hidden))
    return told[..., 0], np.exp(told[..., 1]) ** 2, hidden


def gate_by_hand(head, prompt, layers, temperature):
    w, hidden = doubles(head), prompt
    for k in layers:
        hidden = hidden @ w[f"gating.layers.{k}.weight"].T + w.get(f"gating.layers.{k}.bias", 0)
        if k != layers[-1]:
            hidden = np.maximum(hidden, 0)
            if (norm := f"gating.layers.{k + 2}.running_var") in w:
                n = {
                    name: w[norm.replace("running_var", name)] for name in ("weight", "bias", "running_mean")
                }
                hidden = (hidden - n["running_mean"]) / np.sqrt(w[norm] + 1e-5) * n["weight"] + n["bias"]
    odds = np.exp(hidden / temperature)
    return w["gating.logit_scale"] * odds / odds.sum(1, keepdims=True)


def judged(source, rows=None):
    rows = range(len(PROMPTS)) if rows is None else rows
    asked = [PROMPTS[k] for k in rows], [RESPONSES[k] for k in rows]
    return source.judge(*asked, np.arange(len(asked[0])))


def test_urm_s_reward_is_the_sum_of_means_times_weights(tmp_path):
    head = normal_head()
    source = PublicReward.load(save(tmp_path / "urm", head))
    means, variances, weights = normal_by_hand(head, states_by_hand(tmp_path / "urm")[0])
    judgement = judged(source)
    assert isinstance(judgement, Interval)
    np.testing.assert_allclose(judgement.sample(np.zeros(4)), (means * weights).sum(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(judgement.variance(), (variances * weights**2).sum(1), rtol=1e-3)
    plain = replace(source, head=replace(source.head, how="plain"))
    np.testing.assert_allclose(judged(plain).variance(), variances.sum(1), rtol=1e-3)
    ratings, told = source.head.ratings(source.states(PROMPTS, RESPONSES)[:, 0])
    assert ratings.means.shape == (1, 4, len(ATTRIBUTES))
    np.testing.assert_allclose(ratings.means[0], means, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(told[0], weights, rtol=1e-3, atol=1e-4)
    assert np.ptp(judgement.midpoint()) > 0.5 and (weights < 0).any()  # unbounded, no softmax


def test_armorm_s_gate_reads_the_prompt_and_the_transform_comes_before_it(tmp_path, caplog):
    head = gated_head()
    with caplog.at_level(logging.WARNING):
        source = PublicReward.load(save(tmp_path / "armo", head, gating_temperature=10, num_objectives=19))
    assert "its rewards have variance 0" in caplog.text
    last, prompt = states_by_hand(tmp_path / "armo")
    w, gate = doubles(head), gate_by_hand(head, prompt, (0, 1, 2, 3), 10)
    rewards = last @ w["regression_layer.weight"].T  # (N, 19)
    expected = (gate * (rewards @ w["reward_transform_matrix"])).sum(1)
    judgement = judged(source)
    np.testing.assert_allclose(judgement.midpoint(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(source(PROMPTS, RESPONSES), expected, rtol=1e-4, atol=1e-5)
    coefficients = source.head.weights(torch.tensor(prompt, dtype=torch.float32)).numpy()
    np.testing.assert_allclose((rewards * coefficients).sum(1), expected, rtol=1e-4, atol=1e-5)  # its card
    np.testing.assert_allclose(coefficients[0], coefficients[2], rtol=1e-4)  # one prompt, two responses
    assert np.abs(coefficients[0] - coefficients[1]).max() > 0.05
    assert (judgement.variance() == 0).all()


@pytest.mark.parametrize(("kind", "transform"), [("llama", True), ("gemma2", False)])
def test_qrm_s_quantiles_combine_level_by_level(tmp_path, kind, transform):
    head = quantile_head(transform)
    source = PublicReward.load(
        save(tmp_path / "qrm", head, kind, gating_temperature=5.0, num_quantiles=LEVELS, num_objectives=19)
    )
    last, prompt = states_by_hand(tmp_path / "qrm", kind)
    w, gate = doubles(head), gate_by_hand(head, prompt, (0, 4, 11), 5.0)
    matrix = w["reward_transform_matrix"] if transform else np.eye(OBJECTIVES)
    quantiles = (last @ w["regression_layer.weight"].T).reshape(-1, OBJECTIVES, LEVELS)
    expected = np.array(
        [[gate[n] @ (quantiles[n, :, q] @ matrix) for q in range(LEVELS)] for n in range(len(PROMPTS))]
    )
    judgement = judged(source)
    assert isinstance(judgement, Members)
    np.testing.assert_allclose(judgement.scores, expected, rtol=1e-3, atol=1e-4)
    score = (gate * (quantiles.mean(2) @ matrix)).sum(1)  # the model's own: expectations are combined
    np.testing.assert_allclose(judgement.sample(np.zeros(4)), score, rtol=1e-3, atol=1e-4)
    mean = expected.mean(1, keepdims=True)
    np.testing.assert_allclose(
        judgement.variance(), ((expected - mean) ** 2).sum(1) / (LEVELS - 1), rtol=2e-3
    )


# --- pooling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["urm", "qrm"])
def test_no_padding_batch_or_order_changes_a_judgement(tmp_path, monkeypatch, layout):
    head, config = (normal_head(), {}) if layout == "urm" else (quantile_head(), {"num_quantiles": LEVELS})
    source = PublicReward.load(save(tmp_path / "one", head, gating_temperature=5, **config))
    whole = source.states(PROMPTS, RESPONSES)
    source.tokenizer.padding_side = "left"
    torch.testing.assert_close(source.states(PROMPTS, RESPONSES), whole)
    source.tokenizer.padding_side = "right"
    for k in range(len(PROMPTS)):
        torch.testing.assert_close(
            source.states([PROMPTS[k]], [RESPONSES[k]])[0], whole[k], rtol=1e-4, atol=1e-5
        )
    monkeypatch.setattr(classifier, "EVALUATION_TOKENS", 70)
    turned = source.states(PROMPTS[::-1], RESPONSES[::-1])
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        judged(source, [2]).sample(np.zeros(1))[0], source(PROMPTS, RESPONSES)[2], rtol=1e-4
    )
    assert len(source([], [])) == 0


def test_a_prompt_that_is_cut_keeps_its_end(tmp_path):
    config = {"gating_temperature": 10, "max_position_embeddings": 64}
    source = PublicReward.load(save(tmp_path / "armo", gated_head(), **config))
    assert np.isfinite(source(["a" * 200], ["b"])).all()


def test_as_a_source_it_trains_policies_and_knows_or_is_told_the_truth(tmp_path):
    source = PublicReward.load(save(tmp_path / "urm", normal_head()))
    judgement = judged(source)
    np.testing.assert_array_equal(source.true_reward(judgement, PROMPTS, RESPONSES), judgement.midpoint())
    told = replace(source, truth=lambda prompts, responses: np.arange(4.0))
    np.testing.assert_array_equal(told.true_reward(judgement, PROMPTS, RESPONSES), np.arange(4.0))
    unit = Unit.of(judgement.sample(np.zeros(4)), judgement.variance())
    assert all(np.isfinite(one).all() for one in unit.of_judgement(judgement, np.zeros(4), np.ones(4)))
    method = Method("variance_aware", 0.1)
    run = trainer(2, source, ["2 3", "4"], method=method, words=6, tokens=2, iterations=1)
    log = run.step()
    assert np.isfinite(log["reward"]).all() and len(log) == 2


# --- what is refused ------------------------------------------------------------------------------------


def without(head, name):
    return {key: one for key, one in head.items() if key != name}


REFUSED = {
    "a tensor is missing": (without(normal_head(), "weights.fc.2.bias"), {}, ["weights.fc.2.bias", "(12)"]),
    "the score is missing": (without(normal_head(), "score.weight"), {}, ["score.weight", "(10, 16)"]),
    "one score, an ordinary classifier's": (
        {"score.weight": torch.zeros(1, WIDTH)}, {}, ["expected the heads of URM", "found score.weight"]),
    "no head": ({"lm_head.weight": torch.zeros(3, WIDTH)}, {}, ["expected the heads of URM", "found none"]),
    "four attributes": (
        normal_head() | {"score.weight": torch.zeros(8, WIDTH)}, {},
        ["score.weight: expected (10, 16), got (8, 16)"]),
    "another width": (
        normal_head() | {"weights.fc.0.weight": torch.zeros(HIDDEN, 8)}, {},
        ["weights.fc.0.weight: expected (any, 16), got (12, 8)"]),
    "a tensor too many": (
        normal_head() | {"weights.fc.6.weight": torch.zeros(5, 5)}, {},
        ["does not have: weights.fc.6.weight"]),
    "not a number": (
        normal_head() | {"score.weight": torch.full((10, WIDTH), math.nan)}, {}, ["score.weight", "NaN"]),
    "quantized": (
        normal_head() | {"score.weight": torch.zeros(10, WIDTH).char()}, {}, ["quantized", "int8"]),
    "no temperature": (gated_head(), {}, ["config.json: gating_temperature"]),
    "temperature 0": (gated_head(), {"gating_temperature": 0}, ["config.json: gating_temperature", "0"]),
    "half a quantile": (
        gated_head(), {"gating_temperature": 10, "num_quantiles": 0.5}, ["config.json: num_quantiles"]),
    "quantiles that the weights do not have": (
        quantile_head(), {"gating_temperature": 5, "num_quantiles": 5},
        ["regression_layer.weight: expected (95, 16), got (133, 16)"]),
    "a gate that ends in a normalization": (
        without(without(quantile_head(), "gating.layers.11.weight"), "gating.layers.11.bias"),
        {"gating_temperature": 5}, ["gating.layers"]),
    "a transform of another size": (
        gated_head() | {"reward_transform_matrix": torch.eye(5)}, {"gating_temperature": 10},
        ["reward_transform_matrix: expected (19, 19), got (5, 5)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told_with_what_would(tmp_path, case):
    head, config, told = REFUSED[case]
    folder = save(tmp_path / "model", head, **config)
    with pytest.raises(ValueError) as error:
        PublicReward.load(folder)
    for words in (str(folder), *told):
        assert words in str(error.value)


def test_files_that_cannot_be_read_or_trusted_are_refused(tmp_path):
    folder = save(tmp_path / "model", normal_head())
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:30])
    with pytest.raises(BackboneError, match=r"00002\.safetensors: cannot be read as safetensors"):
        PublicReward.load(folder)
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(BackboneError, match=r"pickled weights \(\.bin\).*expected safetensors"):
        PublicReward.load(folder)
    with pytest.raises(BackboneError, match="expected a model's folder; `hf download"):
        PublicReward.load("LxzGordon/URM-LLaMa-3.1-8B")


def test_a_backbone_that_is_not_whole_is_refused(tmp_path):
    folder = save(tmp_path / "model", normal_head())
    first = folder / "model-00001-of-00002.safetensors"
    save_file(without(load_file(first), "model.norm.weight"), first, metadata={"format": "pt"})
    with pytest.raises(
        BackboneError, match=r"expected a whole backbone beside its head, without norm\.weight"
    ):
        PublicReward.load(folder)


def test_a_gate_needs_the_turns_that_it_was_trained_with(tmp_path):
    source = PublicReward.load(save(tmp_path / "armo", gated_head(), gating_temperature=10))
    source.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"conversation 0 has no '<\|eot_id\|>.*expected the chat template"):
        source(["a"], ["b"])
    folder = save(tmp_path / "other", gated_head(), gating_temperature=10, model_type="mistral")
    with pytest.raises(
        BackboneError, match="model_type: a gate's place is known for llama and gemma2, got mistral"
    ):
        PublicReward.load(folder)
