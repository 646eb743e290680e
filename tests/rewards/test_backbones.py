"""The stack of separate backbones against the same models run and trained one by one."""

import numpy as np
import torch
from torch.nn import functional

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.profiles import load_profile
from vaalign_lib.rewards.backbones import BackboneReward, load_backbones, train_backbones
from vaalign_lib.rewards.classifier import features_and_scores, new_reward_model, tokenized_pairs

SETTINGS = load_profile("smoke").ensembles.backbones.model_copy(update={"learning_rate": 3e-3})


def member(stack, k):
    model, _ = new_reward_model("tiny-gemma", 16, 0)
    model.load_state_dict({name: w[k] for name, w in stack.weights.items()}, strict=False)
    return model


def test_scores_are_those_of_each_member_alone(pairs):
    data = tokenized_pairs(world_tokenizer(), pairs, 64)
    stack = train_backbones(data["chosen_ids"], data["rejected_ids"], settings=SETTINGS, width=16,
                            members=3, pairs_each=64, seed=0)  # fmt: skip
    scores = stack.scores(data["chosen_ids"][:40])
    assert scores.shape == (40, 3)
    for k in range(3):
        alone = features_and_scores(member(stack, k), data["chosen_ids"][:40])[1]
        torch.testing.assert_close(scores[:, k], alone, rtol=1e-4, atol=1e-5)


def test_training_in_the_stack_equals_training_alone(pairs):
    data = tokenized_pairs(world_tokenizer(), pairs.head(64), 64)
    both = [data["chosen_ids"], data["rejected_ids"]]
    stack = train_backbones(*both, settings=SETTINGS, width=16, members=2, pairs_each=64, seed=5)
    random = torch.Generator().manual_seed(5)
    samples = torch.randint(64, (2, 64), generator=random)
    order = samples.gather(1, torch.rand(samples.shape, generator=random).argsort(1))
    for k in range(2):
        model, tokenizer = new_reward_model("tiny-gemma", 16, 5 + k)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=SETTINGS.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
        for rows in order[k].split(32):
            scores = []
            for side in both:
                batch = tokenizer.pad({"input_ids": [side[r] for r in rows.tolist()]}, return_tensors="pt")
                scores.append(model(**batch).logits[:, 0])
            loss = -functional.logsigmoid(scores[0] - scores[1]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        for name, parameter in model.named_parameters():
            apart = (stack.weights[name][k] - parameter.detach()).abs()
            # the first steps of Adam blow the rounding of the smallest gradients up
            assert (apart < 1e-4).float().mean() > 0.99 and apart.max() < 1e-3


def test_saved_and_loaded_it_gives_the_same_bits_as_a_source(pairs, tmp_path):
    data = tokenized_pairs(world_tokenizer(), pairs.head(64), 64)
    stack = train_backbones(data["chosen_ids"], data["rejected_ids"], settings=SETTINGS, width=16,
                            members=3, pairs_each=32, seed=0)  # fmt: skip
    stack.save(tmp_path)
    prompts, responses = pairs["prompt"].tolist()[:30], pairs["chosen"].tolist()[:30]
    found = [
        BackboneReward(one, truth=World(0).gold).judge(prompts, responses, np.zeros(30, dtype=int))
        for one in (stack, load_backbones(tmp_path))
    ]
    assert found[0].scores.shape == (30, 3)
    assert np.array_equal(found[0].scores, found[1].scores)
    truth = BackboneReward(stack, truth=World(0).gold).true_reward(found[0], prompts, responses)
    assert np.array_equal(truth, World(0).gold(prompts, responses))
