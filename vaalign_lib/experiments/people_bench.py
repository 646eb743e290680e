"""Notebook 10's bench: policies on stored responses of the real model, each with people of its own, in closed
form (`theory.feature_bench`): what training would converge to, were policies free over these responses.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array
from transformers import AutoModelForCausalLM

from vaalign_lib.data.pairs import prompts_of, spread_prompts
from vaalign_lib.experiments.conditions import PLACEBO
from vaalign_lib.experiments.people import heard_heads, heard_words
from vaalign_lib.experiments.references import reference
from vaalign_lib.models import end_id, load_tokenizer, pad_id, response_texts
from vaalign_lib.policies.checks import checked_prompts
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import rollout
from vaalign_lib.profiles import Sampling, Study
from vaalign_lib.rewards.base import Array
from vaalign_lib.rewards.rated_heads import HeardHeads, SmoothField
from vaalign_lib.rewards.raters import ExchangedWords, HeardWords
from vaalign_lib.statistics.tests import mean
from vaalign_lib.store import write_atomically
from vaalign_lib.theory.feature_bench import Bench, Objective, at_kl, probabilities

PROMPTS, SAMPLES = 64, 24  # of the stored responses; samples of each prompt
WORLDS, POLICIES = 8, 200  # of disjoint prompts; of each method in each, the same people's in all
NATS, MAIN_NATS = (0.25, 0.5, 1.0), 0.5
LEAST = 0.05  # of the mean that a weight is at least
COMPONENTS = 10  # of the encoder's features, of linear policies
METHODS = ("vanilla", "variance_aware", PLACEBO)
SHOWN_WORDS, SHOWN_PROMPTS = 8, 4  # words that fall and that rise most; prompts of examples
_STORED = 2**31 + 10  # in place of a step, for their random numbers


def responses(study: Study) -> pd.DataFrame:
    """Return what the reference writes, made now or before: `prompt` (a number), `sample`, `answer`."""
    prompts = prompts_of(study.profile.policies.data, PROMPTS)
    config = {"prompts": prompts, "samples": SAMPLES, "seed": study.seed}
    config["sampling"] = study.profile.policies.sampling.model_dump()
    inputs = {"model": reference(study, "llama")}

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        sampling = study.profile.policies.sampling
        for sample in range(SAMPLES):
            write_sample(scratch, inputs["model"], prompts, sampling, study.seed, sample)
        parts = [pd.read_parquet(scratch / f"{sample}.parquet") for sample in range(SAMPLES)]
        pd.concat(parts, ignore_index=True).to_parquet(folder / "responses.parquet")

    code = ("vaalign_lib.policies.sampling", "vaalign_lib.policies.reference")
    folder = study.store.resumable("stored-responses", write, config, inputs, code)
    return pd.read_parquet(folder / "responses.parquet")


def write_sample(
    folder: Path, model: Path, prompts: Sequence[str], sampling: Sampling, seed: int, sample: int
) -> None:
    """Let the reference answer every prompt once more, unless it has."""
    path = folder / f"{sample}.parquet"
    if path.exists():
        return
    tokenizer = load_tokenizer(model)
    policy = ReferencePolicy(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    asked = checked_prompts(tokenizer, prompts, policy.config, sampling)
    random = np.random.default_rng([seed, sample, _STORED])
    uniforms = torch.from_numpy(random.random((len(prompts), sampling.max_new_tokens), dtype=np.float32))
    written = rollout(policy, asked, uniforms, sampling, end_id(tokenizer), pad_id(tokenizer))
    answers = response_texts(tokenizer, written.responses.tolist())
    table = pd.DataFrame({"prompt": range(len(prompts)), "sample": sample, "answer": answers})
    write_atomically(path, table.to_parquet())


# --- the bench ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What a source and its placebo say of stored responses (prompts, samples), and of their errors."""

    truth: Array
    shared: Array  # the reward without what single policies hear
    variance: Array
    placebo: Array
    heard: Array  # (policies, prompts, samples), rewards as each policy hears them

    def bench(self, prompts: slice, features: Array | None = None) -> Bench:
        """Return the bench of some prompts; features (prompts, samples, width) of linear policies."""
        errors = self.heard[:, prompts] - self.shared[prompts]
        variance = floored(self.variance[prompts])
        return Bench(features, self.truth[prompts], self.shared[prompts], variance, errors)

    def weights(self, prompts: slice) -> dict[str, Array]:
        """Return the weights of each method's penalty, with mean 1 (prompts, samples)."""
        known = {"variance_aware": self.variance[prompts], PLACEBO: self.placebo[prompts]}
        plain = {"vanilla": np.ones_like(self.truth[prompts])}
        return plain | {name: floored(one) / floored(one).mean() for name, one in known.items()}


def floored(variance: Array) -> Array:
    """Return variances that are at least a twentieth of their mean."""
    return np.maximum(variance, LEAST * variance.mean())


def by_words(source: HeardWords, answers: Sequence[str], shape: tuple[int, int], policies: int) -> Judged:
    """Return what people's words say of answers, prompt by prompt."""
    asked, nobody = [""] * len(answers), np.zeros(len(answers), dtype=np.int64)
    plain = source.judge(asked, answers, nobody)
    placebo = ExchangedWords(source, source.uses(answers))
    truth = source.true_reward(plain, asked, answers).reshape(shape)
    heard = [source.judge(asked, answers, nobody + j).midpoint().reshape(shape) for j in range(policies)]
    weights = source.spread(answers, placebo.variances).reshape(shape)
    return Judged(truth, truth, plain.variance().reshape(shape), weights, np.stack(heard))


def by_heads(source: HeardHeads, answers: Sequence[str], shape: tuple[int, int], seed: int) -> Judged:
    """Return what heads say of answers, one head for each policy, prompt by prompt."""
    asked, nobody = [""] * len(answers), np.zeros(len(answers), dtype=np.int64)
    plain, inputs = source.judge(asked, answers, nobody), source.inputs(answers)
    heard = (inputs @ source.own.T).T.reshape(-1, *shape)
    weights = SmoothField(source, tuple(answers), seed).weights(answers).reshape(shape)
    truth = source.true_reward(plain, asked, answers).reshape(shape)
    return Judged(truth, heard.mean(0), plain.variance().reshape(shape), weights, heard)


def components(features: Array, shape: tuple[int, int]) -> Array:
    """Return the first principal components of features, each with deviation 1 (prompts, samples, width)."""
    centred = features - features.mean(0)
    left = np.linalg.svd(centred, full_matrices=False)[0]
    found = left[:, :COMPONENTS] * np.sqrt(len(features))
    return found.reshape(*shape, COMPONENTS)


def compared(judged: Mapping[str, Judged], features: Array) -> pd.DataFrame:
    """Return by row, world, KL and method what policies gain in true reward, and how it varies over them;
    nothing where no coefficient has that KL.
    """
    found = []
    for row, one in judged.items():
        for world, prompts in enumerate(np.array_split(np.arange(len(one.truth)), WORLDS)):
            part = slice(prompts[0], prompts[-1] + 1)
            bench = one.bench(part, features[part] if row == "linear" else None)
            for nats in NATS:
                for method, weights in one.weights(part).items():
                    about = {"row": row, "world": world, "nats": nats, "method": method}
                    with suppress(ValueError):  # linear policies may have no such coefficient
                        found.append(about | at_kl(bench, Objective(weights), nats).row())
    return pd.DataFrame(found)


def log_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Return by row, KL and rival the mean over worlds of ln[(V / G^2 of the rival) / (V / G^2 of
    variance-aware)] and of what it is made of, with Student's intervals, over `worlds` where both were
    found; `clear`: all gains are above 0.
    """
    rows = []
    for (row, nats), part in table.groupby(["row", "nats"], sort=False):
        for rival in (PLACEBO, "vanilla"):
            pair = part[part["method"].isin([rival, "variance_aware"])]
            of = pair.pivot(index="world", columns="method", values=["gain", "deviation"]).dropna()
            if pair["method"].nunique() < 2 or len(of) < 2:
                continue
            gains, deviations = of["gain"], of["deviation"]
            scaled = np.log((deviations / gains) ** 2)
            values = {
                "log_ratio": scaled[rival] - scaled["variance_aware"],
                "log_variances": 2 * np.log(deviations[rival] / deviations["variance_aware"]),
                "difference": gains["variance_aware"] - gains[rival],
            }
            found = {"row": row, "nats": nats, "rival": rival, "worlds": len(of)}
            for name, one in values.items():
                found |= mean(one).columns(name)
            rows.append(
                found | {"gain": float(gains["variance_aware"].mean()), "clear": bool((gains > 0).all(None))}
            )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Stored:
    """Stored responses, made now or before, and who judges them."""

    study: Study

    @cached_property
    def answers(self) -> list[str]:
        """The responses, prompt by prompt."""
        return responses(self.study).sort_values(["prompt", "sample"])["answer"].tolist()

    @cached_property
    def words(self) -> HeardWords:
        """People's words, of which every policy hears its own people's."""
        return heard_words(self.study, self.study.seed)

    @cached_property
    def heads(self) -> HeardHeads:
        """Reward models, of which every policy hears its own."""
        return heard_heads(self.study, self.study.seed, POLICIES)

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """What is said of the responses, by row."""
        shape = PROMPTS, len(self.answers) // PROMPTS
        of_people = by_words(self.words, self.answers, shape, POLICIES)
        of_heads = by_heads(self.heads, self.answers, shape, self.study.seed)
        return {"people": of_people, "heads": of_heads, "linear": of_people}


def measured(stored: Stored) -> dict[str, pd.DataFrame]:
    """Return `bench`, `uses`, `words` and `examples`."""
    judged, answers = stored.judged, stored.answers
    domains = spread_prompts(stored.study.profile.policies.data, PROMPTS)["subset"].tolist()
    writing = Writing(stored.words, answers, written(judged["people"]))
    inputs = stored.heads.inputs(answers)[:, :-1]
    return {
        "bench": compared(judged, components(inputs, judged["people"].truth.shape)),
        "uses": writing.table(),
        "words": writing.words(),
        "examples": writing.examples(domains),
    }


# --- what such policies write ---------------------------------------------------------------------------


def written(judged: Judged, nats: float = MAIN_NATS) -> dict[str, Array]:
    """Return by method how probable each response is, mean over policies (prompts, samples)."""
    found: dict[str, list[Array]] = {"reference": [np.full(judged.truth.shape, 1 / judged.truth.shape[1])]}
    for prompts in np.array_split(np.arange(len(judged.truth)), WORLDS):
        part = slice(prompts[0], prompts[-1] + 1)
        bench = judged.bench(part)
        for method, weights in judged.weights(part).items():
            policies = at_kl(bench, Objective(weights), nats)
            shares = probabilities(policies, judged.heard[:, part], weights)
            found.setdefault(method, []).append(shares.mean(0))
    return {method: np.concatenate(parts) for method, parts in found.items()}


@dataclass(frozen=True)
class Writing:
    """What policies write, by how probable they make stored answers."""

    source: HeardWords
    answers: Sequence[str]  # prompt by prompt
    shares: Mapping[str, Array]  # by method (prompts, samples)

    @cached_property
    def counts(self) -> csr_array:
        """How often each answer has each word (answers, words)."""
        return csr_array(np.stack([self.source.uses([answer]) for answer in self.answers]))

    def uses(self, method: str) -> Array:
        """Return how often a response uses each word on average (words,)."""
        share = self.shares[method]
        return np.asarray(self.counts.T @ share.ravel() / len(share))

    def table(self) -> pd.DataFrame:
        """Return by method: known words of a response, their mean rating and mean variance, the share of
        responses without any, and the share of the most frequent word.
        """
        rows = []
        means, variances = self.source.moments
        none = np.asarray(self.counts.sum(1) == 0)
        for method, share in self.shares.items():
            uses = self.uses(method)
            total = uses.sum()
            about = {"method": method, "known": total, "rating": uses @ means / total}
            about |= {"variance": uses @ variances / total, "none": share.ravel() @ none / len(share)}
            rows.append(about | {"most_frequent": uses.max() / total})
        return pd.DataFrame(rows)

    def words(self) -> pd.DataFrame:
        """Return the words whose share of all known ones falls and rises most against the reference."""
        before, parts = self.uses("reference"), []
        means, variances = self.source.moments
        for method in (one for one in self.shares if one != "reference"):
            after = self.uses(method)
            change = after / after.sum() - before / before.sum()
            order = np.argsort(change, kind="stable")
            chosen = np.concatenate([order[:SHOWN_WORDS], order[-SHOWN_WORDS:]])
            part = {
                "method": method,
                "word": self.source.words["text"].iloc[chosen],
                "change": change[chosen],
            }
            parts.append(pd.DataFrame(part | {"mean": means[chosen], "variance": variances[chosen]}))
        return pd.concat(parts, ignore_index=True)

    def examples(self, domains: Sequence[str]) -> pd.DataFrame:
        """Return each method's most probable answers to the first prompts, their rating and variance."""
        rows, samples = [], self.shares["reference"].shape[1]
        for prompt in range(SHOWN_PROMPTS):
            for method, share in self.shares.items():
                answer = self.answers[prompt * samples + int(share[prompt].argmax())]
                judged = self.source.judge([""], [answer], np.zeros(1, dtype=np.int64))
                truth = float(self.source.true_reward(judged, [""], [answer])[0])
                about = {"prompt": prompt, "domain": domains[prompt], "method": method, "answer": answer}
                about |= {"probability": float(share[prompt].max()), "rating": truth}
                rows.append(about | {"variance": float(judged.variance()[0])})
        return pd.DataFrame(rows)
