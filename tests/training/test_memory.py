"""Estimates of memory against what a step really holds, and how many policies fit."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from tests.small_problem import TableReward, tokenizer
from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.jobs import WORKER
from vaalign_lib.models import tiny_config
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Lora, PolicyTraining, Sampling, load_profile
from vaalign_lib.store import PlanError
from vaalign_lib.training.memory import (
    Sizes,
    available_bytes,
    beside_bytes,
    critic_bytes,
    fitting,
    sizes_of,
    stack_bytes,
)
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.ppo import Trainer
from vaalign_lib.training.run import lora_config

SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


def config(architecture, words):
    if architecture == "gpt2":
        size = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128}
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(vocab_size=words, **size, **none, **SPECIAL)
    return Qwen2Config(vocab_size=words, **LLAMA, **SPECIAL)


class Peak(TorchDispatchMode):
    """Counts the bytes of what is computed and still held, and the most there were."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.now -= self.held.pop(key)


def peak_bytes(trainer):
    """Return the most that a step holds at a time, beside what was there before."""
    peak = Peak()
    there = [*trainer.stack.model.parameters(), *trainer.reference.model.parameters()]
    for one in there:
        peak._count(one.untyped_storage())
    before = peak.now
    with peak:
        trainer.train(2)  # the optimizer's moments come with the first
    return peak.most - before


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
@pytest.mark.parametrize(
    ("words", "how"),
    [(500, {}), (4000, {}), (4000, {"gradient_checkpointing": True}), (4000, {"precision": "bfloat16"})],
)
def test_estimates_are_near_what_a_step_keeps(architecture, words, how, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(architecture, words))
    model.save_pretrained(tmp_path)
    ppo = PPO(iterations=2, batch_size=8, mini_batch_size=8, ppo_epochs=1)
    source = TableReward(lambda p, r: float(len(r)), lambda p, r: 1.0)
    trainer = Trainer(
        PolicyStack(tmp_path, 2, **how), model, tokenizer(words), Task(["5"] * 4, source),
        Method(standardized=False), ppo, Sampling(min_new_tokens=24, max_new_tokens=24),
        critic="own_states", warm_up=8,
    )  # fmt: skip
    weights = sum(p.numel() for p in model.parameters())
    sizes = Sizes(weights, weights, 4, 128, words, prompt=1)
    held = weights * 4 + 2 * weights * 8  # the reference, and two policies with where they began
    estimate = stack_bytes(sizes, PolicyTraining(ppo=ppo, **how), 2, 24) - held
    ratio = estimate / peak_bytes(trainer)
    assert 0.95 < ratio < 1.5


@pytest.mark.parametrize(("words", "layers"), [(4000, None), (4000, [2, 3]), (5000, [2, 3])])
@pytest.mark.parametrize("half", [False, True])
def test_estimates_of_adapters_are_near_what_a_step_keeps(words, layers, half, tmp_path):
    """As in the profile of a pretrained model: one base, in single precision or half, products in half."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=words, **LLAMA, **SPECIAL))
    model.save_pretrained(tmp_path)
    lora = Lora(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                "up_proj", "down_proj"], layers_to_transform=layers, sixteen_bit=half)  # fmt: skip
    ppo = PPO(iterations=2, batch_size=8, mini_batch_size=8, ppo_epochs=1)
    source = TableReward(lambda p, r: float(len(r)), lambda p, r: 1.0)
    dtype = torch.bfloat16 if half else None
    stack = PolicyStack(tmp_path, 2, lora=lora_config(lora), precision="bfloat16", dtype=dtype)
    trainer = Trainer(
        stack, None, tokenizer(words), Task(["5"] * 4, source), Method(standardized=False), ppo,
        Sampling(temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=24, max_new_tokens=24),
        critic="own_states", warm_up=8,
    )  # fmt: skip
    weights, trained = model.num_parameters(), sum(p[0].numel() for p in stack.parameters().values())
    sizes = Sizes(weights, trained, 4, 128, words, prompt=1, frozen=stack.frozen)
    training = PolicyTraining(ppo=ppo, lora=lora, precision="bfloat16")
    held = weights * (2 if half else 4) + 2 * trained * 8  # the base, and adapters with where they began
    assert stack.frozen == (0 if layers is None else 2)
    assert 0.8 < (stack_bytes(sizes, training, 2, 24) - held) / peak_bytes(trainer) < 1.5


def test_adapters_of_some_layers_are_counted_as_a_stack_has_them():
    profile, tiny = load_profile("smoke"), tiny_config("mistral", load_profile("smoke").reference.width)
    lora = Lora(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    training = profile.policies.training["mistral"].model_copy(update={"lora": lora})
    every = profile.policies.training | {"mistral": training}
    changed = profile.model_copy(update={"policies": profile.policies.model_copy(update={"training": every})})
    stack, sizes = PolicyStack(tiny, 3, lora=lora_config(lora)), sizes_of(changed, "mistral")
    assert sizes.trained == sum(p[0].numel() for p in stack.parameters().values())
    assert sizes.frozen == stack.frozen == 1
    lora = lora.model_copy(update={"layers_to_transform": [1, 7]})
    every = {"mistral": training.model_copy(update={"lora": lora})}
    changed = changed.model_copy(update={"policies": profile.policies.model_copy(update={"training": every})})
    with pytest.raises(PlanError, match=r"reference.models.mistral: .*expected some of 0 to 1, got"):
        sizes_of(changed, "mistral")


def test_a_critic_on_the_references_states_is_counted(tmp_path):
    """Its features are most of what a warm-up and a step hold here."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("qwen2", 60))
    model.save_pretrained(tmp_path)
    ppo = PPO(iterations=2, batch_size=32, mini_batch_size=8, ppo_epochs=1)
    source = TableReward(lambda p, r: float(len(r)), lambda p, r: 1.0)
    stack, peak = PolicyStack(tmp_path, 2), Peak()
    with peak:
        trainer = Trainer(
            stack, model, tokenizer(60), Task(["5"] * 4, source), Method(standardized=False), ppo,
            Sampling(min_new_tokens=24, max_new_tokens=24), warm_up=96,
        )  # fmt: skip
    features = trainer.critic.weight.shape[1]
    assert features == 2 * 5 * 128
    sizes = Sizes(0, 0, 4, 128, 60, prompt=1, features=features, warm_up=96)
    training = PolicyTraining(ppo=ppo)
    assert 0.8 < critic_bytes(sizes, training, 0, 24) / peak.most < 1.5
    step = critic_bytes(replace(sizes, warm_up=0), training, 2, 24)
    assert 0.7 < step / peak_bytes(trainer) < 1.5


def test_the_plan_counts_the_critic_of_a_profile():
    profile = load_profile("smoke")
    sizes = sizes_of(profile, "qwen2")
    assert (sizes.features, sizes.warm_up) == (2 * 3 * profile.reference.width, 64)
    training = profile.policies.training["qwen2"]
    without = stack_bytes(replace(sizes, features=0), training, 5, 32)
    assert stack_bytes(sizes, training, 5, 32) > without + critic_bytes(sizes, training, 5, 32) - 2
    own = profile.policies.model_copy(update={"critic": "own_states"})
    assert sizes_of(profile.model_copy(update={"policies": own}), "qwen2").features == 0


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "mistral"])
def test_weights_are_counted_as_a_stack_has_them(architecture):
    profile = load_profile("smoke")
    settings = profile.policies.training[architecture]
    lora = None if settings.lora is None else lora_config(settings.lora)
    tiny = tiny_config(architecture, profile.reference.width)
    stack = PolicyStack(tiny, 3, lora=lora)
    sizes = sizes_of(profile, architecture)
    assert sizes.trained == sum(p[0].numel() for p in stack.parameters().values())
    whole = AutoModelForCausalLM.from_config(tiny)
    assert sizes.weights == sum(p.numel() for p in whole.parameters())


def test_as_many_policies_as_fit():
    sizes, ppo = (Sizes(10**6, 10**6, 2, 64, 1000), PPO(iterations=1, mini_batch_size=4, batch_size=4))
    training = PolicyTraining(ppo=ppo)
    room = stack_bytes(sizes, training, 5, 32) / 0.9 + 1
    assert fitting(sizes, training, 80, 32, int(room)) == 5
    assert fitting(sizes, training, 3, 32, int(room)) == 3
    assert fitting(sizes, training, 80, 32, 10**6) == 0
    assert available_bytes(4) * 4 <= available_bytes(1) or torch.cuda.is_available()


def test_a_model_that_is_not_at_hand_is_named(tmp_path):
    profile = load_profile("smoke")
    models = profile.reference.models | {"gpt2": str(tmp_path / "nowhere")}
    changed = profile.model_copy(
        update={"reference": profile.reference.model_copy(update={"models": models})}
    )
    with pytest.raises(PlanError, match=r"reference.models.gpt2: .*nowhere is not at hand"):
        sizes_of(changed, "gpt2")


def test_reward_models_beside_a_stack_are_counted(tmp_path):
    profile = load_profile("smoke")
    assert beside_bytes(profile, "ensemble") == 0  # tiny ones are
    tiny = tiny_config("qwen2", 32)
    tiny.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(tiny)
    model.save_pretrained(tmp_path)
    weights = sum(p.numel() for p in model.parameters())
    settings = profile.reward_model.model_copy(update={"backbone": str(tmp_path)})
    changed = profile.model_copy(update={"reward_model": settings, "true_reward": str(tmp_path)})
    assert beside_bytes(changed, "ensemble") == weights * (4 + 2)  # float32 and bfloat16
    assert beside_bytes(changed, "judge-a") == 0


def test_prompts_of_a_file_are_counted_in_tokens(tmp_path):
    tiny = AutoModelForCausalLM.from_config(tiny_config("gpt2", 32))
    tiny.save_pretrained(tmp_path / "model")
    words = world_tokenizer()
    words.save_pretrained(tmp_path / "model")
    prompts = [{"prompt": " ".join(["name"] * n), "subset": "all"} for n in (3, 11, 30)]
    one = [{"role": "user", "content": prompts[1]["prompt"]}]
    ids = words.apply_chat_template(one, add_generation_prompt=True)["input_ids"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    profile = load_profile("smoke")
    models = profile.reference.models | {"gpt2": str(tmp_path / "model")}
    reference = profile.reference.model_copy(update={"models": models})
    policies = profile.policies.model_copy(update={"data": str(tmp_path / "prompts.jsonl"), "prompts": 2})
    changed = profile.model_copy(update={"reference": reference, "policies": policies})
    assert sizes_of(changed, "gpt2").prompt == len(ids) > 11


def test_a_worker_of_a_cluster_takes_what_it_may(monkeypatch):
    monkeypatch.setattr(WORKER, "memory", None)
    whole = available_bytes(1)
    monkeypatch.setattr(WORKER, "memory", whole // 7)
    assert available_bytes(1) == whole // 7 and available_bytes(100) == whole // 100
