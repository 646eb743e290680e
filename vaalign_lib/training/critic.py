"""Critics: what a stack of policies expects of a response that is not finished."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

CriticKind = Literal["own_states", "reference_states"]
RIDGE = 10.0  # in units of one token's squared feature
FEATURES = 4096  # of a token, unless one layer alone has more
AT_A_TIME = 2**26  # numbers in double precision, of a warm-up


class Critic:
    """N linear value functions of features: weight (N, F) and bias (N, 1) are trained, the features'
    centre and unit (F,) are those of the reference policy's responses.

    `own_states` is after trl's value head, linear in the policy's own last hidden state, and its loss also
    trains the policy's body. `reference_states` is linear in `reference_features`, which are constant, so
    that nothing of the value loss reaches the policy. `benchmarks/critics.py` compares them.
    """

    def __init__(self, kind: CriticKind, size: int, features: Tensor, mask: Tensor) -> None:
        """Begin at zero, with centre and unit of features (B, T, F) of tokens (B, T)."""
        self.kind = kind
        parts = features.split(max(1, AT_A_TIME // mask.numel()), dim=-1)
        seen = (part[mask].double() for part in parts)
        centre, unit = zip(*((one.mean(0), one.std(0)) for one in seen), strict=True)
        self.centre = torch.cat(centre).float()  # (F,)
        self.unit = torch.cat(unit).clamp(min=1e-3).float()
        self.weight = nn.Parameter(torch.zeros(size, features.shape[-1], device=features.device))
        self.bias = nn.Parameter(torch.zeros(size, 1, device=features.device))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"critic.weight": self.weight, "critic.bias": self.bias}

    @torch.no_grad()
    def fit(self, features: Tensor, mask: Tensor, scores: Tensor) -> float:
        """Start with the ridge regression of scores (N, B), as every policy's objective sees them, on the
        features (B, T, F) of tokens before them; return the mean share of the scores' variance explained in
        a fifth of the responses, to which it was not fitted.
        """
        held_out = torch.arange(len(mask), device=mask.device) % 5 == 4
        fitted = mask & ~held_out[:, None]  # (B, T)
        centre = _targets(fitted, scores).mean(0)  # (N,)
        gram = moment = torch.zeros((), dtype=torch.float64, device=mask.device)
        for design, targets in self._pieces(features, fitted, scores):
            gram = gram + design.T @ design  # (F, F)
            moment = moment + design.T @ (targets - centre)  # (F, N)
        gram.diagonal().add_(RIDGE)
        weight = torch.linalg.solve(gram, moment)  # (F, N)
        self.weight.copy_(weight.T)
        self.bias.copy_(centre[:, None])
        tested = mask & held_out[:, None]
        rest = [t - d @ weight - centre for d, t in self._pieces(features, tested, scores)]
        spread = _targets(tested, scores).var(0, correction=0)  # (N,)
        return float((1 - torch.cat(rest).square().mean(0) / spread).mean())

    def _pieces(self, features: Tensor, tokens: Tensor, scores: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield standardized features and scores of some tokens at a time."""
        places, targets = tokens.nonzero(), _targets(tokens, scores)
        rows = max(1, AT_A_TIME // features.shape[-1])
        for some, aims in zip(places.split(rows), targets.split(rows), strict=True):
            design = (features[some[:, 0], some[:, 1]] - self.centre) / self.unit  # (tokens, F)
            yield design.double(), aims

    def values(self, features: Tensor) -> Tensor:
        """Return the value before each token (N, B, T) from features (N * B, T, F), policy by policy."""
        size, width = self.weight.shape
        rows = features.reshape(size, -1, width).float()  # (N, B * T, F)
        scaled = self.weight / self.unit  # (N, F)
        constant = self.bias[:, 0] - (scaled * self.centre).sum(1)  # not a product: its rounding depends on N
        values = torch.baddbmm(constant[:, None, None], rows, scaled[:, :, None])  # (N, B * T, 1)
        return values.view(size, -1, features.shape[1])


def _targets(tokens: Tensor, scores: Tensor) -> Tensor:
    """Return the scores of some tokens' responses (tokens, N)."""
    return scores.T[tokens.nonzero()[:, 0]].double()


def layers_seen(layers: int, width: int) -> list[int]:
    """Return which layers' states, each of so many numbers, are features; 0 are the embeddings. All are if
    they make at most `FEATURES`, else the last and as many others, evenly spaced, as make no more.
    """
    most = max(1, min(layers + 1, FEATURES // (2 * width)))
    return sorted(np.linspace(layers, 0, most).round().astype(int).tolist())


def reference_features(states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Return hidden states (B, T, width) before each token and the sums of those before it in tens,
    side by side (B, T, F).
    """
    layers = torch.cat(states, dim=-1).float()  # (B, T, layers * width)
    sums = (layers * mask[:, :, None]).cumsum(1) / 10  # (B, T, layers * width)
    earlier = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), dim=1)
    return torch.cat((layers, earlier), dim=-1)
