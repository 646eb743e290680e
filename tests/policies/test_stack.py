"""A stack gives what separate models give."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

from tests.policies.conftest import END, PAD, WORDS, config
from vaalign_lib.policies.checks import StackError
from vaalign_lib.policies.sampling import Prompts, sequences
from vaalign_lib.policies.stack import PolicyStack

KINDS = ["gpt2", "gpt2-untied", "qwen2", "qwen2-untied", "mistral-untied", "mistral", "llama-untied"]
ROWS, TOKENS = 3, 7


def disturb(stack, seed=1):
    """Make the policies differ."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))


def batch(policies, seed=2):
    """Return prompts of different lengths with responses, policy by policy."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (policies * ROWS,), generator=random)
    rows = [torch.randint(2, WORDS, (int(n),), generator=random).tolist() for n in lengths]
    responses = torch.randint(2, WORDS, (policies * ROWS, TOKENS), generator=random)
    return rows, responses, Prompts.from_lists(rows, 5, PAD)


def stacked_logits(stack, prompts, responses):
    joined = sequences(prompts, responses, torch.float32)
    return stack.logits(stack.hidden(joined.ids, joined.mask, joined.positions)[:, -TOKENS:])


def separate_logits(model, rows, responses):
    """Return the logits of each row alone, without any padding."""
    out = []
    for row, response in zip(rows, responses, strict=True):
        ids = torch.tensor([row + response.tolist()[:-1]])
        out.append(model(ids).logits[0, -TOKENS:])
    return torch.stack(out)


def separate(stack, policy, folder, base=None):
    stack.export(policy, folder)
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)


def loss(logits):
    """Return a number that depends on all logits in no symmetric way."""
    return (logits.log_softmax(-1) * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()


def assert_near(gradient, other):
    """Compare as wholes: single elements of nearly 0 round differently on different processors."""
    assert gradient.shape == other.shape
    assert torch.linalg.vector_norm(gradient - other) <= 1e-4 * torch.linalg.vector_norm(other) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_full_weights_equal_those_of_separate_models(kind, saved, tmp_path):
    stack = PolicyStack(saved(kind), 4)
    disturb(stack)
    rows, responses, prompts = batch(4)
    logits = stacked_logits(stack, prompts, responses).split(ROWS)
    torch.stack([loss(one) for one in logits]).sum().backward()
    for j in range(4):
        model = separate(stack, j, tmp_path / f"out-{j}")
        part = slice(j * ROWS, (j + 1) * ROWS)
        alone = separate_logits(model, rows[part], responses[part])
        torch.testing.assert_close(logits[j], alone, atol=2e-5, rtol=1e-5)
        loss(alone).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert gradients.keys() == stack.parameters().keys()
        for name, parameter in stack.parameters().items():
            assert_near(parameter.grad[j], gradients[name])


@pytest.mark.parametrize("kind", ["gpt2", "mistral-untied"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_logits_and_gradients_of_adapters_equal_those_of_peft(kind, targets, saved, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True)
    folder = saved(kind)
    stack = PolicyStack(folder, 3, lora=lora)
    disturb(stack)
    rows, responses, prompts = batch(3)
    logits = stacked_logits(stack, prompts, responses).split(ROWS)
    torch.stack([loss(one) for one in logits]).sum().backward()
    for j in range(3):
        model = separate(stack, j, tmp_path / f"out-{j}", base=folder)
        part = slice(j * ROWS, (j + 1) * ROWS)
        alone = separate_logits(model, rows[part], responses[part])
        torch.testing.assert_close(logits[j], alone, atol=2e-5, rtol=1e-5)
        loss(alone).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert len(gradients) == len(stack.parameters())
        for name, parameter in stack.parameters().items():
            layer, _, part_name = name.rpartition(".")
            side = {"down": "lora_A", "up": "lora_B"}[part_name]
            theirs = gradients[f"base_model.model.{layer}.{side}.default.weight"]
            assert_near(parameter.grad[j].T, theirs)


def test_adapters_start_at_the_reference_and_can_be_left_out(saved):
    folder = saved("mistral")
    stack = PolicyStack(folder, 3, lora=LoraConfig(r=4, target_modules="all-linear"), seeds=[5, 6, 7])
    rows, responses, prompts = batch(3)
    reference = separate_logits(AutoModelForCausalLM.from_pretrained(folder), rows, responses)
    torch.testing.assert_close(stacked_logits(stack, prompts, responses), reference, atol=2e-5, rtol=1e-5)
    disturb(stack)
    assert (stacked_logits(stack, prompts, responses) - reference).abs().max() > 0.1
    with stack.without_adapters():
        torch.testing.assert_close(stacked_logits(stack, prompts, responses), reference, atol=2e-5, rtol=1e-5)


def test_the_start_of_an_adapter_is_pefts_and_its_own(saved):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    first = PolicyStack(saved("mistral"), 3, lora=lora, seeds=[5, 6, 7]).parameters()
    second = PolicyStack(saved("mistral"), 2, lora=lora, seeds=[7, 5]).parameters()
    name = next(n for n in first if n.endswith("down"))
    assert torch.equal(first[name][0], second[name][1])
    assert torch.equal(first[name][2], second[name][0])
    assert not torch.equal(first[name][0], first[name][1])
    bound = 16**-0.5  # Kaiming's, for a = sqrt(5) and 16 inputs
    assert 0.9 * bound < first[name].abs().max() <= bound
    assert not first[name.replace("down", "up")].any()


def test_dropout_acts_in_updates_only_and_each_policy_has_its_own(saved):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    stack = PolicyStack(saved("mistral"), 3, lora=lora)
    disturb(stack)
    _, responses, prompts = batch(3)
    plain = stacked_logits(stack, prompts, responses)
    with stack.updating([1, 2, 3]):
        dropped = stacked_logits(stack, prompts, responses)
    with stack.updating([1, 9, 3]):
        other = stacked_logits(stack, prompts, responses).split(ROWS)
    assert (dropped - plain).abs().max() > 0.01
    assert torch.equal(stacked_logits(stack, prompts, responses), plain)
    for same, (a, b) in zip((True, False, True), zip(dropped.split(ROWS), other, strict=True), strict=True):
        assert torch.equal(a, b) == same


def test_the_mean_of_a_dropped_layer_is_the_layer(saved):
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3)
    stack = PolicyStack(saved("mistral"), 1, lora=lora)
    disturb(stack)
    layer = stack.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    plain = layer(x)
    draws = []
    for seed in range(4000):
        with stack.updating([seed]):
            draws.append(layer(x))
    spread = torch.stack(draws).std(0) / 4000**0.5
    assert ((torch.stack(draws).mean(0) - plain).abs() < 5 * spread + 1e-6).all()


def test_four_bits_under_adapters(saved, tmp_path):
    stack = PolicyStack(saved("mistral"), 2, lora=LoraConfig(r=4, target_modules="all-linear"), four_bit=True)
    kinds = {type(m).__name__ for m in stack.model.modules()}
    assert {"Linear4bit", "StackedLora"} <= kinds
    _, responses, prompts = batch(2)
    joined = sequences(prompts, responses, stack.dtype)
    logits = stack.logits(stack.hidden(joined.ids, joined.mask, joined.positions))
    loss(logits).backward()
    ups = [p.grad for name, p in stack.parameters().items() if name.endswith("up")]
    assert ups and all(g.isfinite().all() and g.abs().sum() > 0 for g in ups)
    assert all(p.dtype == torch.float32 for p in stack.parameters().values())
    stack.export(1, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4


def test_a_stack_from_a_configuration_is_one_random_model_many_times():
    stack = PolicyStack(config("gpt2"), 3)
    for parameter in stack.parameters().values():
        assert torch.equal(parameter[0], parameter[2])
    assert stack.config.activation_function == "gelu_pytorch_tanh"  # gelu_new, in one operation


def test_an_exported_policy_keeps_its_tokenizer_and_nothing_else_is_overwritten(saved, tmp_path):
    stack = PolicyStack(saved("qwen2"), 2)
    stack.export(0, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in files and not any(name.endswith(".bin") for name in files)
    with pytest.raises(IndexError, match="expected 0 to 1, got 2"):
        stack.export(2, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == END
    stack.export(1, tmp_path / "out")  # an earlier export is replaced
    (tmp_path / "out" / "tokenizer.json").write_text("somebody's")
    with pytest.raises(FileExistsError, match=r"holds other things \(tokenizer.json\)"):
        stack.export(1, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "somebody's"


def test_generate_of_transformers_works_on_a_stack(saved, tmp_path):
    stack = PolicyStack(saved("qwen2"), 2)
    disturb(stack)
    _, _, prompts = batch(2)
    both = stack.model.generate(
        input_ids=prompts.ids, attention_mask=prompts.real.long(), do_sample=False, max_new_tokens=6
    )
    for j in range(2):
        part = slice(j * ROWS, (j + 1) * ROWS)
        alone = separate(stack, j, tmp_path / f"out-{j}").generate(
            input_ids=prompts.ids[part],
            attention_mask=prompts.real[part].long(),
            do_sample=False,
            max_new_tokens=6,
        )
        width = min(both.shape[1], alone.shape[1])
        assert torch.equal(both[part, :width], alone[:, :width])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1, "dtype": torch.int8}, "floating point"),
        ({"size": 1, "four_bit": True}, "give lora"),
        ({"size": 1, "lora": LoraConfig(bias="all")}, "bias='all' is beyond plain LoRA.*expected 'none'"),
        ({"size": 1, "lora": LoraConfig(use_dora=True)}, "use_dora=True.*expected False"),
        ({"size": 1, "lora": LoraConfig(target_modules=["embed_tokens"])}, "linear layers only"),
        ({"size": 1, "source": BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=16, is_decoder=True)}, "got bert"),
    ],
)  # fmt: skip
def test_what_cannot_be_stacked_is_refused(options, message):
    arguments = {"source": config("mistral")} | options
    with pytest.raises(StackError, match=message):
        PolicyStack(arguments.pop("source"), arguments.pop("size"), **arguments)


def test_full_weights_hold_no_reference():
    with (
        pytest.raises(StackError, match="hold no reference"),
        PolicyStack(config("gpt2"), 1).without_adapters(),
    ):
        pass


def test_ids_of_no_policy_are_refused():
    stack = PolicyStack(config("gpt2"), 2)
    with pytest.raises(ValueError, match="multiple of 2 rows"):
        stack.model(torch.ones(3, 4, dtype=torch.long))


# --- memory and precision of updates ------------------------------------------------------------------


def gradients_and_kept_bytes(source, lora, **options):
    """Return gradients of an update with dropout, and the bytes kept for its backward pass."""
    stack = PolicyStack(source, 3, lora=lora, **options)
    disturb(stack)
    weights = {p.untyped_storage().data_ptr() for p in stack.model.parameters()}
    _, responses, prompts = batch(3)
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    joined = sequences(prompts, responses, stack.dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):  # noqa: SIM117
        with stack.updating([4, 5, 6]):
            hidden = stack.hidden(joined.ids, joined.mask, joined.positions)
            loss(stack.logits(hidden)).backward()
    return {name: p.grad for name, p in stack.parameters().items()}, sum(kept.values())


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "mistral-untied"])
@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_changes_memory_and_nothing_else(kind, adapters, saved):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5) if adapters else None
    plain, much = gradients_and_kept_bytes(saved(kind), lora)
    again, little = gradients_and_kept_bytes(saved(kind), lora, gradient_checkpointing=True)
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]) and gradient.any()
    assert little < 0.6 * much


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_mixed_precision_rounds_products_and_nothing_else(kind, saved):
    exact, _ = gradients_and_kept_bytes(saved(kind), None)
    rounded, _ = gradients_and_kept_bytes(saved(kind), None, precision="bfloat16")
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - gradient).norm() / gradient.norm()
        assert 0 < error < 0.1, name


def test_padding_is_unseen_in_mixed_precision(saved):
    stack = PolicyStack(saved("qwen2"), 2, precision="bfloat16")
    _, responses, prompts = batch(2)
    joined = sequences(prompts, responses, stack.dtype)
    logits = stack.logits(stack.hidden(joined.ids, joined.mask, joined.positions)[:, -TOKENS:])
    other = Prompts(prompts.ids.masked_fill(~prompts.real, 5), prompts.real)
    changed = sequences(other, responses, stack.dtype)
    again = stack.logits(stack.hidden(changed.ids, changed.mask, changed.positions)[:, -TOKENS:])
    assert logits.isfinite().all() and torch.equal(logits, again)
    assert not prompts.real.all()
