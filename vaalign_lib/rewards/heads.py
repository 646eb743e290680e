"""Stage 2: any number of reward heads on the features of a frozen backbone, trained at once (Table 7).

AdamW works weight by weight and no gradient norm is clipped, so every head is trained as if it were alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vaalign_lib.jobs import progress
from vaalign_lib.profiles import HeadTraining
from vaalign_lib.statistics.arrays import count

HeadKind = Literal[
    "paper",  # same data in the same order, fresh weights
    "order",  # same data, own order, fresh weights
    "bootstrap",  # own bootstrap sample
    "disjoint",  # own fifth of the data
    "anchored",  # same data, drawn back to the fresh weights
    "mlp",  # same data, small networks
]
KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
HIDDEN = 32  # units of a small network
PARTS = 5  # disjoint parts of the data; BRME gives each of its five heads 20%
INITIAL_DEVIATION = 0.02  # of fresh weights, as transformers draws them


@dataclass(frozen=True)
class Heads:
    """A grid of heads (ensembles, members) of one kind: one ensemble of ten is the paper's, eighty of ten
    the `independent` protocol, where every policy has a reward model of its own, drawn with its own data.

    Linear heads have `weights` named `weight` (ensembles, members, width); networks have `inner`
    (ensembles, members, hidden, width), `inner_bias` and `outer` (ensembles, members, hidden).
    """

    kind: HeadKind
    weights: dict[str, Tensor]

    @property
    def ensembles(self) -> int:
        return len(next(iter(self.weights.values())))

    def scores(self, features: Tensor) -> Tensor:
        """Return the scores of features (responses, width): (ensembles, members, responses)."""
        flat = {name: w.flatten(0, 1) for name, w in self.weights.items()}
        return _scores(flat, features[None]).unflatten(0, (self.ensembles, -1))

    def own_scores(self, features: Tensor, ensemble: Tensor) -> Tensor:
        """Return the scores of features (responses, width) by one ensemble each: (responses, members)."""
        if self.ensembles == 1:
            return self.scores(features)[0].T.contiguous()
        scores = features.new_empty(len(features), next(iter(self.weights.values())).shape[1])
        for index in ensemble.unique().tolist():
            rows = ensemble == index
            one = {name: w[index] for name, w in self.weights.items()}
            scores[rows] = _scores(one, features[rows][None]).T
        return scores


def _scores(weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """Score features (groups, rows, width) by heads (heads, ...), each group by its share: (heads, rows).

    Heads are laid out group by group; with one group all heads see the same rows.
    """
    groups = len(features)
    if "weight" in weights:
        weight = weights["weight"].unflatten(0, (groups, -1))  # (groups, heads / groups, width)
        return (weight @ features.mT).flatten(0, 1)
    inner = weights["inner"].unflatten(0, (groups, -1))  # (groups, heads / groups, hidden, width)
    hidden = inner.flatten(1, 2) @ features.mT  # (groups, heads / groups * hidden, rows)
    hidden = hidden.unflatten(1, inner.shape[1:3]).flatten(0, 1)  # (heads, hidden, rows)
    active = functional.gelu(hidden + weights["inner_bias"][..., None])  # (heads, hidden, rows)
    return torch.einsum("khr,kh->kr", active, weights["outer"])


# --- training ---------------------------------------------------------------------------------------


def train_heads(
    chosen: Tensor,
    rejected: Tensor,
    *,
    kind: HeadKind,
    settings: HeadTraining,
    seed: int,
    ensembles: int = 1,
    members: int = 10,
    pairs_each: int | None = None,
    first_head: Tensor | None = None,
    snapshots: Sequence[int] = (),
    description: str = "reward heads",
) -> tuple[Heads, dict[int, Heads]]:
    """Train a grid of heads on the features (pairs, width) of preferred and other responses.

    With several `ensembles`, or with `pairs_each`, an ensemble first draws a bootstrap sample of its own.
    The paper keeps the `first_head` (width,), that of stage 1, as the first of the ten. Returned are the
    heads, and by step copies of them after the steps `snapshots`, of which 0 is before the first.
    """
    _check(chosen, rejected, kind, ensembles, members, pairs_each)
    random = torch.Generator().manual_seed(seed)
    weights = _fresh(kind, ensembles * members, chosen.shape[1], random)
    if first_head is not None and kind != "mlp":
        if first_head.shape != chosen.shape[1:]:
            raise ValueError(f"first_head: expected {chosen.shape[1]} weights, got {tuple(first_head.shape)}")
        weights["weight"][0] = first_head
    anchors = {name: w.clone() for name, w in weights.items()}
    rows = _rows_of_groups(kind, len(chosen), ensembles, members, pairs_each, random)
    steps = steps_of(settings, rows.shape[1])
    if wrong := [step for step in snapshots if not 0 <= step <= steps]:
        raise ValueError(f"snapshots: expected steps from 0 to {steps}, the last, got {wrong[0]}")
    optimizer = _optimizer([w.requires_grad_(True) for w in weights.values()], settings)
    half_turn = math.pi if settings.scheduler == "cosine" else 0.0  # or constant
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(half_turn * step / steps)))
    kept: dict[int, Heads] = {}
    for step, batch in batches(rows, settings, random, description):
        if step in snapshots:
            kept[step] = _grid(kind, weights, ensembles)
        loss = additive_loss(_gaps(weights, chosen, rejected, batch))
        if kind == "anchored":
            distances = [((w - anchors[name]) ** 2).sum() for name, w in weights.items()]
            loss = loss + 0.5 * settings.anchor / rows.shape[1] * torch.stack(distances).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    heads = _grid(kind, weights, ensembles)
    return heads, kept | ({steps: heads} if steps in snapshots else {})


def _grid(kind: HeadKind, weights: dict[str, Tensor], ensembles: int) -> Heads:
    copies = {name: w.detach().clone() for name, w in weights.items()}
    return Heads(kind, {name: w.unflatten(0, (ensembles, -1)) for name, w in copies.items()})


def additive_loss(gaps: Tensor) -> Tensor:
    """Return the sum over heads of the Bradley-Terry loss of each, a mean over its pairs (Appendix B).

    The gaps (heads, pairs) say how far each head puts the chosen response above the rejected one.
    """
    return -functional.logsigmoid(gaps).mean(1).sum()


def steps_of(settings: HeadTraining, pairs: int) -> int:
    """Return how many steps a training takes; the last batch of an epoch may be smaller."""
    return math.ceil(settings.epochs * math.ceil(pairs / settings.batch_size))


def batches(
    rows: Tensor, settings: HeadTraining, random: torch.Generator, description: str
) -> Iterator[tuple[int, Tensor]]:
    """Yield step and batch (groups, pairs of it); each epoch has the rows (groups, pairs) in a new order."""
    size = settings.batch_size
    for step in progress(range(steps_of(settings, rows.shape[1])), description):
        at = step % math.ceil(rows.shape[1] / size)
        if at == 0:
            order = rows.gather(1, torch.rand(rows.shape, generator=random).argsort(1))
        yield step, order[:, at * size : (at + 1) * size]


def _gaps(weights: dict[str, Tensor], chosen: Tensor, rejected: Tensor, batch: Tensor) -> Tensor:
    """Return how far each head puts the chosen responses of its batch above the others (heads, rows)."""
    if "weight" in weights:  # linear: one product with the differences instead of two
        return _scores(weights, chosen[batch] - rejected[batch])
    return _scores(weights, chosen[batch]) - _scores(weights, rejected[batch])


def _check(
    chosen: Tensor, rejected: Tensor, kind: HeadKind, ensembles: int, members: int, pairs_each: int | None
) -> None:
    if chosen.ndim != 2 or chosen.shape != rejected.shape or not len(chosen):
        raise ValueError(
            "chosen, rejected: expected two tables (pairs, width) of one shape, got "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        if not (values.is_floating_point() and values.isfinite().all()):
            raise ValueError(f"{name}: expected finite features of a floating type")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if ensembles < 1 or members < 2:
        raise ValueError(f"ensembles, members: expected at least 1 and 2, got {ensembles} and {members}")
    if pairs_each is not None:
        count("pairs_each", pairs_each)


def _fresh(kind: HeadKind, heads: int, width: int, random: torch.Generator) -> dict[str, Tensor]:
    """Draw weights as transformers draws those of a new head."""
    if kind != "mlp":
        return {"weight": INITIAL_DEVIATION * torch.randn(heads, width, generator=random)}
    inner = torch.randn(heads, HIDDEN, width, generator=random) / math.sqrt(width)
    outer = torch.randn(heads, HIDDEN, generator=random) / math.sqrt(HIDDEN)
    return {"inner": inner, "inner_bias": torch.zeros(heads, HIDDEN), "outer": outer}


def _rows_of_groups(
    kind: HeadKind, pairs: int, ensembles: int, members: int, pairs_each: int | None, random: torch.Generator
) -> Tensor:
    """Choose the pairs that each group of heads learns from (groups, pairs of a group).

    A group is all heads, the heads of one ensemble, or one head: whoever shares data and order.
    """
    size = pairs_each or pairs
    if ensembles == 1 and pairs_each is None:
        base = torch.arange(pairs)[None]  # (1, pairs)
    else:
        base = torch.randint(pairs, (ensembles, size), generator=random)
    if kind in ("paper", "anchored", "mlp"):
        return base
    own = base.repeat_interleave(members, 0)  # (heads, size), ensemble by ensemble
    if kind == "order":
        return own
    if kind == "bootstrap":
        return own.gather(1, torch.randint(size, own.shape, generator=random))
    part = size // PARTS
    if not part:
        raise ValueError(f"pairs: expected at least {PARTS} to divide, got {size}")
    return torch.cat([_parts(row, members, part, random) for row in base])


def _parts(row: Tensor, members: int, part: int, random: torch.Generator) -> Tensor:
    """Deal one ensemble's data out to its members: every five heads share a division into fifths."""
    dealt: list[Tensor] = []
    while len(dealt) < members:
        mixed = row[torch.randperm(len(row), generator=random)]
        dealt += mixed[: part * PARTS].split(part)
    return torch.stack(dealt[:members])


def _optimizer(weights: list[Tensor], settings: HeadTraining) -> Optimizer:
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "paged_adamw_32bit":
        from bitsandbytes.optim import PagedAdamW32bit  # loads its kernels when imported

        return PagedAdamW32bit(weights, **options)
    return AdamW(weights, **options, fused=True)
