"""Critics: what a stack of policies expects of a response that is not finished.

Two kinds. `own_states` is after trl's value head, linear in the policy's own last hidden state, and
its loss also trains the policy's body. `reference_states` is linear in all hidden states of the
reference policy and in their running sums, so that it remembers what was said; these features are
constant, and nothing of the value loss reaches the policy. `benchmarks/critics.py` compares them.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["own_states", "reference_states"]
RIDGE = 10.0  # in units of one token's squared feature


class Critic:
    """N linear value functions of features.

    Attributes:
        kind: where the features come from.
        weight: (N, features), trained.
        bias: (N, 1), trained.
        centre: of the features (features,).
        unit: of the features (features,).
    """

    def __init__(self, kind: Kind, size: int, features: Tensor, mask: Tensor) -> None:
        """Begin at zero, with the features' centre and unit.

        Args:
            kind: of the features.
            size: N.
            features: of the reference policy's responses (responses, tokens, features).
            mask: of their tokens (responses, tokens).
        """
        self.kind = kind
        seen = features[mask].double()
        self.centre = seen.mean(0).float()
        self.unit = seen.std(0).clamp(min=1e-3).float()
        width = features.shape[-1]
        self.weight = nn.Parameter(torch.zeros(size, width, device=features.device))
        self.bias = nn.Parameter(torch.zeros(size, 1, device=features.device))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"critic.weight": self.weight, "critic.bias": self.bias}

    @torch.no_grad()
    def fit(self, features: Tensor, mask: Tensor, scores: Tensor) -> float:
        """Warm up: start with the ridge regression of scores on the tokens before them.

        Args:
            features: of the reference policy's responses (responses, tokens, features).
            mask: (responses, tokens).
            scores: of each response, as every policy's objective sees it (N, responses).

        Returns:
            The mean share of the scores' variance that is explained in a fifth of the responses, to which
            it was not fitted.
        """
        held_out = torch.arange(len(mask), device=mask.device) % 5 == 4
        design, targets = self._rows(features, mask, scores, ~held_out)
        centre = targets.mean(0)
        gram = design.T @ design
        gram.diagonal().add_(RIDGE)
        weight = torch.linalg.solve(gram, design.T @ (targets - centre))
        self.weight.copy_(weight.T)
        self.bias.copy_(centre[:, None])
        design, targets = self._rows(features, mask, scores, held_out)
        error = (targets - design @ weight - centre).square().mean(0)
        return float((1 - error / targets.var(0, correction=0)).mean())

    def _rows(
        self, features: Tensor, mask: Tensor, scores: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return standardized features and scores of the chosen responses' tokens."""
        tokens = mask & chosen[:, None]
        design = (features[tokens] - self.centre) / self.unit
        response = torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape)[tokens]
        return design.double(), scores.T[response].double()

    def values(self, features: Tensor) -> Tensor:
        """Return the value before each token (N, responses, tokens).

        Args:
            features: policy by policy (N * responses, tokens, features).
        """
        size, width = self.weight.shape
        rows = features.reshape(size, -1, width).float()
        scaled = self.weight / self.unit
        constant = self.bias[:, 0] - (scaled * self.centre).sum(
            1
        )  # not a product: its rounding depends on N
        values = torch.baddbmm(constant[:, None, None], rows, scaled[:, :, None])
        return values.view(size, -1, features.shape[1])


def reference_features(states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Return hidden states before each token and the sums of those before it, in tens of tokens.

    Args:
        states: of every layer (responses, tokens, width).
        mask: of the responses' tokens (responses, tokens).
    """
    layers = torch.cat(states, dim=-1).float()
    sums = (layers * mask[:, :, None]).cumsum(1) / 10
    earlier = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), dim=1)
    return torch.cat((layers, earlier), dim=-1)
