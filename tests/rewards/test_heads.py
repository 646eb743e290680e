"""Stacked heads against heads trained one by one; what each kind means; the convex limit."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional

from vaalign_lib.profiles import HeadTraining
from vaalign_lib.rewards import heads as module
from vaalign_lib.rewards.heads import INITIAL_DEVIATION, KINDS, train_heads

WIDTH, PAIRS = 6, 90
GENERATOR = torch.Generator().manual_seed(0)
CHOSEN = torch.randn(PAIRS, WIDTH, generator=GENERATOR) + 0.3
REJECTED = torch.randn(PAIRS, WIDTH, generator=GENERATOR)
SETTINGS = HeadTraining(batch_size=20, learning_rate=0.01, optimizer="adamw_torch", weight_decay=0.1,
                        scheduler="cosine", epochs=3)  # fmt: skip


def train(kind="paper", settings=SETTINGS, **options):
    return train_heads(CHOSEN, REJECTED, kind=kind, settings=settings, seed=1, **options)


def spy_on_batches(monkeypatch):
    batches = []
    original = module._gaps
    monkeypatch.setattr(
        module, "_gaps", lambda w, c, r, batch: batches.append(batch) or original(w, c, r, batch)
    )
    return batches


def score_alone(parts, features):
    if "weight" in parts:
        return features @ parts["weight"]
    hidden = functional.gelu(features @ parts["inner"].T + parts["inner_bias"])
    return hidden @ parts["outer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ensembles", [1, 3])
def test_stacked_training_equals_training_each_head_alone(kind, ensembles, monkeypatch):
    batches = spy_on_batches(monkeypatch)
    trained, kept = train(kind, ensembles=ensembles, members=4, snapshots=[0])
    start = {name: w.flatten(0, 1) for name, w in kept[0].weights.items()}
    final = {name: w.flatten(0, 1) for name, w in trained.weights.items()}
    for head in range(ensembles * 4):
        own = {name: torch.nn.Parameter(w[head].clone()) for name, w in start.items()}
        optimizer = torch.optim.AdamW(own.values(), lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for batch in batches:
            rows = batch[head * len(batch) // (ensembles * 4)]
            gap = score_alone(own, CHOSEN[rows]) - score_alone(own, REJECTED[rows])
            loss = -functional.logsigmoid(gap).mean()
            if kind == "anchored":
                squares = sum(((own[name] - start[name][head]) ** 2).sum() for name in own)
                loss = loss + 0.5 * SETTINGS.anchor / PAIRS * squares
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        for name, parameter in own.items():
            torch.testing.assert_close(final[name][head], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_number_of_steps_and_epochs(monkeypatch):
    batches = spy_on_batches(monkeypatch)
    train()
    assert len(batches) == 15  # 3 epochs of 90 pairs in batches of 20, the last of 10
    for epoch in range(3):
        seen = torch.cat([b[0] for b in batches[5 * epoch : 5 * epoch + 5]])
        assert sorted(seen.tolist()) == list(range(PAIRS))
    batches.clear()
    train(settings=SETTINGS.model_copy(update={"epochs": 0.5}))
    assert len(batches) == 3


def test_who_sees_which_data(monkeypatch):
    batches = spy_on_batches(monkeypatch)

    def rows_of(kind, **options):
        batches.clear()
        train(kind, members=10, settings=SETTINGS.model_copy(update={"epochs": 1}), **options)
        return torch.cat(batches, dim=1)

    assert len(rows_of("paper")) == len(rows_of("anchored")) == len(rows_of("mlp")) == 1
    order = rows_of("order")
    assert len(order) == 10 and len({tuple(row.tolist()) for row in order}) == 10
    assert all(sorted(row.tolist()) == list(range(PAIRS)) for row in order)
    shares = [len(set(row.tolist())) / PAIRS for row in rows_of("bootstrap")]
    assert np.mean(shares) == pytest.approx(1 - np.exp(-1), abs=0.05)
    parts = rows_of("disjoint")
    assert parts.shape == (10, PAIRS // 5)
    for five in (parts[:5], parts[5:]):
        assert sorted(five.flatten().tolist()) == list(range(PAIRS))
    own = rows_of("paper", ensembles=7, pairs_each=30)
    assert own.shape == (7, 30) and len({tuple(sorted(row.tolist())) for row in own}) == 7


def test_fresh_heads_are_drawn_as_transformers_draws_them_and_the_first_is_kept():
    first = torch.arange(WIDTH).float()
    _, kept = train(members=200, first_head=first, snapshots=[0])
    weights = kept[0].weights["weight"][0]
    assert torch.equal(weights[0], first)
    assert weights[1:].std().item() == pytest.approx(INITIAL_DEVIATION, rel=0.1)
    untouched, _ = train(members=200, settings=SETTINGS.model_copy(update={"learning_rate": 1e-12}))
    assert untouched.weights["weight"][0, 1:] == pytest.approx(weights[1:], abs=1e-6)


def test_on_the_same_data_all_heads_reach_the_one_minimum():
    gap = (CHOSEN - REJECTED).double().numpy()
    exact = minimize(lambda w: np.logaddexp(0, -gap @ w).mean(), np.zeros(WIDTH), method="BFGS", tol=1e-9).x
    settings = HeadTraining(batch_size=PAIRS, learning_rate=0.05, optimizer="adamw_torch", weight_decay=0,
                            scheduler="cosine", epochs=600)  # fmt: skip
    trained, kept = train(settings=settings, snapshots=[0])
    assert trained.weights["weight"][0].double().numpy() == pytest.approx(np.tile(exact, (10, 1)), abs=2e-3)
    assert kept[0].weights["weight"][0].std(0).min() > 100 * trained.weights["weight"][0].std(0).max()


def test_heads_with_own_data_keep_disagreeing():
    settings = SETTINGS.model_copy(update={"epochs": 60, "learning_rate": 0.05})
    same, own = (
        train(kind, settings=settings)[0].weights["weight"][0].std(0) for kind in ("paper", "bootstrap")
    )
    assert own.min() > 5 * same.max()


def test_scores_by_own_ensemble_are_those_of_the_grid():
    for kind in ("paper", "mlp"):
        trained, _ = train(kind, ensembles=5, members=3)
        grid = trained.scores(CHOSEN)
        which = torch.arange(PAIRS) % 5
        own = trained.own_scores(CHOSEN, which)
        assert grid.shape == (5, 3, PAIRS) and own.shape == (PAIRS, 3)
        for row in range(PAIRS):
            torch.testing.assert_close(own[row], grid[which[row], :, row])


def test_training_repeats_itself_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two = train("bootstrap", ensembles=2), train("bootstrap", ensembles=2)
    assert torch.equal(one[0].weights["weight"], two[0].weights["weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_paged_adamw_takes_the_same_steps():
    paged = SETTINGS.model_copy(update={"optimizer": "paged_adamw_32bit"})
    plain, other = train()[0].weights["weight"], train(settings=paged)[0].weights["weight"]
    torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "dropout"}, "expected one of paper, order"),
        ({"members": 1}, "expected at least 1 and 2, got 1 and 1"),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        train(**options)
    with pytest.raises(ValueError, match="of one shape"):
        train_heads(CHOSEN, REJECTED[:3], kind="paper", settings=SETTINGS, seed=0)
