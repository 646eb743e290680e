"""The variance that a policy can act on: of contrasts between responses to one prompt.

A member's shift that all responses to a prompt share moves no policy, but it is in the variance of scores; of
heads on one backbone it is nearly all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vaalign_lib.rewards.base import Array, Judgement, Members, PolicyIndex, ScoreSource

ANCHOR = "wonderful question ."  # what anybody may answer in the embedded world


@dataclass(frozen=True)
class Contrasts:
    """An ensemble whose penalty is weighted by the variance of each member's score beyond its score of one
    fixed response, the anchor, to the same prompt. Rewards stay the ensemble's.

    Attributes:
        source: an ensemble.
        anchor: the response that all are compared with.
    """

    source: ScoreSource
    anchor: str = ANCHOR

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Members:
        """Score responses by every member, with the contrasts' variance as weights."""
        judgement = self.source.judge(prompts, responses, policy)
        contrasts = judgement.scores - self._anchored(prompts, policy)  # (responses, members)
        return replace(judgement, weights=replace(judgement, scores=contrasts).variance())

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the source's true reward (responses,)."""
        return self.source.true_reward(judgement, prompts, responses)

    def _anchored(self, prompts: Sequence[str], policy: PolicyIndex) -> Array:
        """Return the members' scores of the anchor (responses, members), each prompt scored once a policy."""
        wanted = list(zip(prompts, policy.tolist(), strict=True))
        if missing := [one for one in dict.fromkeys(wanted) if one not in self._scores]:
            asked, who = zip(*missing, strict=True)
            scores = self.source.scores(asked, [self.anchor] * len(asked), np.array(who))
            self._scores.update(zip(missing, scores, strict=True))
        return np.stack([self._scores[one] for one in wanted])

    @cached_property
    def _scores(self) -> dict[tuple[str, int], Array]:
        return {}
