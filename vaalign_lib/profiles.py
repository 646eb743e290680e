"""Profiles: how large the study runs. A YAML file each, validated; it says sizes, never behaviour.

What cannot run is refused when a profile is loaded. Bounds are generous: what lies beyond is a slip.
"""

import json
import math
import os
import re
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from vaalign_lib.store import PRETRAINED, PROFILES, RunStore, content_of, is_hub_name

PUBLISHED_PROFILE = "embedded"  # its figures and tables are committed
LARGEST_SEED = 2**31 - 1  # of a study; numpy's legacy generator, which trl seeds, ends at 2**32 - 1
LARGEST_FILE = 100_000  # bytes
LARGEST_CONTENT = 10_000  # values, those that an alias stands for counted each time
SHOWN_PROBLEMS = 4  # of a profile, in one line
OURS = ("embedded", "tiny", "tiny-gemma", "gold")  # what these name is made here
TINY_TOKENS = 64  # of prompt and response together, that a tiny policy can tell apart
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# layers that can have adapters, by architecture
LINEAR = {"gpt2": ("c_attn", "c_fc", "c_proj"), "qwen2": _LAYERS, "mistral": _LAYERS}
LLAMA = "llama"  # beside them where a profile names one; there is no tiny one


class ProfileError(ValueError):
    """A profile that does not exist or says something impossible."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1, le=10**7)]
Draws = Annotated[int, Field(ge=100, le=10**7)]
ManyDraws = Annotated[int, Field(ge=20_000, le=10**8)]  # so that rare events are drawn
Instances = Annotated[int, Field(ge=20, le=10**6)]  # so that intervals exist
# of hidden states, which heads divide, two of policies and four of reward models; halves are rotated
PolicyWidth = Annotated[int, Field(ge=4, le=4096, multiple_of=4)]
RewardWidth = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
Share = Annotated[float, Field(ge=1e-10, le=1)]
Rate = Share  # of learning
Positive = Annotated[float, Field(ge=1e-10, le=1e6)]
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Layer = Annotated[int, Field(ge=0, le=10_000)]
Epochs = Annotated[float, Field(ge=1e-10, le=1000)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]
Moment = Annotated[float, Field(ge=0, lt=1)]  # the decay of one of Adam's
Word = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]  # without spaces around it, in one line
Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw_torch", "paged_adamw_32bit"]
Scheduler = Literal["cosine", "constant"]


def _named(word: str, kind: Literal["file", "folder"]) -> AfterValidator:
    """Accept our own word, a name on the hub, or a file, or a model's folder, beside the profile."""

    def check(value: str, info: ValidationInfo) -> str:
        expected = f"expected {word}, a name on the hub, or a {kind}"
        if value == word:
            return value
        if value in OURS:
            raise ValueError(f"{expected}, got {value!r}, which is made here for something else")
        path, on_hub = (info.context or {}).get("folder", Path()) / value, is_hub_name(value)
        if not value or not os.path.exists(path):  # noqa: PTH110 - nor if the name is too long for a path
            if not on_hub or (kind == "file" and "/" not in value):
                said = str(path) if value and not on_hub else value
                raise ValueError(f"{expected}; there is no such {kind}: {said!r:.200}{_remedy(path)}")
            return value
        if path.is_dir() != (kind == "folder"):
            raise ValueError(f"{expected}; {path} is a {'file' if kind == 'folder' else 'folder'}")
        if kind == "folder" and not (path / "config.json").is_file():
            raise ValueError(f"{expected}; {path} has no config.json")
        return str(path.resolve())

    return AfterValidator(check)


def _remedy(path: Path) -> str:
    """Say how a file or folder comes to be that is not there, if it is known."""
    ours = Path(os.path.abspath(path)).is_relative_to(PRETRAINED)  # noqa: PTH100 - no name is refused
    return "; `make pretrained` makes it" if ours else ""


def _rated(value: str, info: ValidationInfo) -> str:
    """Accept a file beside the profile, by its path."""
    path = (info.context or {}).get("folder", Path()) / value
    if not os.path.isfile(path):  # noqa: PTH113 - nor if the name is too long for a path
        text = "expected a file of words and what people rated them; there is no such file"
        raise ValueError(f"{text}: {str(path)!r:.200}{_remedy(path)}")
    return str(path.resolve())


def _is_url(value: str) -> str:
    try:
        HttpUrl(value)
    except ValidationError:
        expected = "expected the URL of an endpoint, such as http://localhost:8000/v1"
        raise ValueError(f"{expected}, got {value!r:.200}") from None
    return value


def _of_all_three(value: dict[str, Any]) -> dict[str, Any]:
    if set(value) - {LLAMA} != set(LINEAR):
        known = f"all of {', '.join(LINEAR)} and no other but {LLAMA}"
        raise ValueError(f"expected {known}, got {', '.join(value) or 'none'}")
    if value.get(LLAMA) == "tiny":
        raise ValueError(f"{LLAMA}: expected a name on the hub or a folder; there is no tiny one")
    return value


def _multiple(whole: str, *parts: str) -> Any:
    """Check that one number of a section is a multiple of others' product."""

    def check(section: Any) -> Any:
        value, factors = getattr(section, whole), {part: getattr(section, part) for part in parts}
        if value % math.prod(factors.values()):
            product = " times ".join(f"{part} {factor}" for part, factor in factors.items())
            raise ValueError(f"{whole} {value} must be a multiple of {product}")
        return section

    return model_validator(mode="after")(check)


Data = Annotated[str, _named("embedded", "file")]
PolicyModel = Annotated[str, _named("tiny", "folder")]
Backbone = Annotated[str, _named("tiny-gemma", "folder")]
TrueReward = Annotated[str, _named("gold", "folder")]
ByArchitecture = AfterValidator(_of_all_three)


class Bandit(Section):
    """Notebook 01."""

    draws: Draws = Field(description="draws of the estimates in Figure 3; the paper has 1,000")
    many_draws: ManyDraws = Field(description="draws beside them, for the risks themselves")


class Theorems(Section):
    """Notebook 02."""

    draws: Annotated[Draws, Field(ge=1000)] = Field(description="draws of the estimates per probability")
    instances: Instances = Field(description="random problems per search or scatter plot")
    settings: Instances = Field(description="random settings per distribution of Figure 4's ratio")


class RewardData(Section):
    """Preference pairs, for training the reward models and for looking at them."""

    pairs: Data = Field(description="`embedded`, a file, or a hub data set")
    evaluation: Data = Field(description="`embedded`, a file, or a hub data set")
    train_pairs: Count = Field(description="embedded pairs to learn from, for each stage")
    held_out_pairs: Count = Field(description="pairs for the temperature of the variances")
    evaluation_pairs: Count = Field(description="embedded pairs per category to look at")


class Reference(Section):
    """The policies that all others start from, and what the corpus of the tiny ones is."""

    models: Annotated[dict[str, PolicyModel], ByArchitecture] = Field(description="`tiny`, or a name or path")
    width: PolicyWidth = Field(description="of the hidden states of the tiny ones")
    responses: Count = Field(description="of the supervised corpus")
    epochs: Epochs
    batch_size: Count
    learning_rate: Rate
    prompts: Count = Field(description="prompts of best-of-n and the exponential tilt")
    samples: Annotated[int, Field(ge=8, le=10**5)] = Field(description="responses to each")


class Pretrained(Section):
    """Stage 1 for a pretrained backbone, in a profile whose settings are those of tiny ones."""

    learning_rate: Rate
    epochs: Epochs
    device_batch_size: Count
    max_length: Count


class RewardModel(Section):
    """Stage 1, Table 5: one reward model with one head."""

    backbone: Backbone = Field(description="`tiny-gemma`, or a model's name or path")
    width: RewardWidth = Field(description="of the hidden states of `tiny-gemma`")
    batch_size: Count = Field(description="effective, over all steps of accumulation")
    device_batch_size: Count = Field(description="of one forward pass")
    learning_rate: Rate
    optimizer: Optimizer
    weight_decay: Coefficient
    scheduler: Scheduler
    epochs: Epochs
    loss_threshold: Positive = Field(description="logged loss at which training stops")
    logging_steps: Count = Field(description="steps over which the logged loss is averaged")
    max_length: Count = Field(description="tokens of prompt and response together")
    gradient_checkpointing: bool
    pretrained: Pretrained | None = None  # instead of these where another backbone is given

    _whole_steps = _multiple("batch_size", "device_batch_size")


class HeadTraining(Section):
    """Stage 2, Table 7: heads on the frozen backbone."""

    batch_size: Count
    learning_rate: Rate
    optimizer: Optimizer
    weight_decay: Coefficient
    scheduler: Scheduler
    epochs: Epochs
    anchor: Positive = 1.0  # prior precision of anchored heads


class Ensembles(Section):
    """Notebook 03: which ensembles are trained and how large they are."""

    members: Annotated[int, Field(ge=2, le=1000)] = Field(description="of an ensemble; 10")
    paper: HeadTraining = Field(description="Table 7's recipe")
    trained: HeadTraining = Field(description="the same for heads that are trained to the end")
    independent: Count = Field(description="ensembles of the `independent` protocol; 80")
    independent_pairs: Count = Field(description="pairs of each of them")
    backbones: HeadTraining = Field(description="for separately trained small backbones")
    backbone_pairs: Count = Field(description="pairs of each of them")
    backbone_width: RewardWidth = Field(description="of those")


class Sampling(Section):
    """How policies write, Table 18."""

    temperature: Temperature = 1.5
    top_k: Annotated[int, Field(ge=0, le=10**7)] = 50  # 0 keeps all
    top_p: Share = 0.9
    min_new_tokens: Annotated[int, Field(ge=0)] = 8
    max_new_tokens: Count = 32
    log_probability_temperature: Temperature = 1.5  # untruncated: the one above, or 1 as in TRL

    @model_validator(mode="after")
    def _can_end(self) -> "Sampling":
        if (least := self.min_new_tokens) > (most := self.max_new_tokens):
            text = f"min_new_tokens {least} must not be above max_new_tokens {most}: no response could end"
            raise ValueError(text)
        return self


class AdaptiveKL(Section):
    target: Positive = Field(description="nats per response")
    horizon: Positive = Field(description="responses")


class PPO(Section):
    """Hyperparameters of PPO by the names of trl 0.11, with its defaults but a constant coefficient."""

    iterations: Count = Field(description="batches of responses")
    batch_size: Count = 128
    mini_batch_size: Count = 128  # responses of one pass
    gradient_accumulation_steps: Count = 1  # passes of one update
    ppo_epochs: Count = 4
    learning_rate: Rate = 1.41e-5
    schedule: Literal["constant", "linear"] = "constant"  # of the learning rate; down to 0 if linear
    adam_betas: Annotated[tuple[Moment, Moment], Field(strict=False)] = (0.9, 0.999)  # YAML has lists
    max_grad_norm: Positive | None = None
    init_kl_coef: Coefficient = 0.2
    adaptive_kl: AdaptiveKL | None = None
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    gamma: Share = 1.0
    lam: Share = 0.95
    cliprange: Share = 0.2
    cliprange_value: Positive = 0.2
    vf_coef: Coefficient = 0.1
    ratio_threshold: Positive = 10.0  # mean ratio above which a pass's loss is 0

    _whole_updates = _multiple("batch_size", "mini_batch_size", "gradient_accumulation_steps")


class Lora(Section):
    """Adapters over a frozen base, Tables 16 and 17; names as in peft's LoraConfig."""

    r: Count
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # None takes peft's choice for the architecture
    target_modules: Literal["all-linear"] | Annotated[list[Word], Field(min_length=1)] | None = None
    layers_to_transform: Annotated[list[Layer], Field(min_length=1)] | None = None  # None takes all
    four_bit: bool = False  # whether the base is held in 4 bits
    sixteen_bit: bool = False  # whether it is held in bfloat16

    @model_validator(mode="after")
    def _can_be_made(self) -> "Lora":
        layers = self.layers_to_transform
        if layers is not None and self.target_modules == "all-linear":
            raise ValueError("layers_to_transform: peft wants target_modules as a list then, not all-linear")
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError(f"layers_to_transform: {layers} names a layer twice")
        if self.four_bit and self.sixteen_bit:
            raise ValueError("four_bit and sixteen_bit: the base is held in one of them")
        return self


class PolicyTraining(Section):
    """How policies of one architecture are trained."""

    lora: Lora | None = None  # None trains all weights
    precision: Precision = "float32"  # of products; trained weights stay in float32
    gradient_checkpointing: bool = False  # whether updates compute activations twice to save memory
    evaluation_samples: Annotated[int, Field(ge=2, le=10**4)] | None = None  # in place of `evaluation`'s
    gentle_rate: Rate | None = None  # learning rate at which the printed coefficients hold their target
    ppo: PPO
    variance_aware: dict[str, Any] = {}  # what differs for variance-aware PPO, where a table says so

    @model_validator(mode="after")
    def _known(self) -> "PolicyTraining":
        if unknown := set(self.variance_aware) - set(PPO.model_fields):
            raise ValueError(f"variance_aware: unknown {', '.join(sorted(unknown))}")
        try:
            self.settings("variance_aware")
        except ValidationError as error:
            raise ValueError(f"variance_aware: {listed(error)}") from None
        return self

    def settings(self, objective: str) -> PPO:
        """Return the settings of PPO for an objective."""
        if not objective.startswith("variance_aware"):
            return self.ppo
        return PPO.model_validate(self.ppo.model_dump() | self.variance_aware)


RunGroup = Literal[
    "main_rows",
    "rows",
    "printed_rows",
    "matched_kl",
    "independent",
    "contrasts",
    "ranges",
    "printed_ranges",
    "primary",
    "shared_worlds",
    "second_seeds",
    "controls",
    "printed_widths",
    "every_row",
    "urme",
    "people",
    "people_heads",
]
ASKS: dict[RunGroup, set[Literal["three_judges", "simulated", "matched", "own_ensembles", "people"]]] = {
    # rows of all three judges, else of judge-b; judges that are each policy's own, stretched, or of another
    # world, or a rate that only tiny policies need; a penalty chosen for a KL; an ensemble for each policy;
    # people in place of judges
    "main_rows": set(),
    "rows": {"three_judges"},
    "printed_rows": {"three_judges"},
    "matched_kl": {"matched"},
    "independent": {"simulated", "matched", "own_ensembles"},
    "contrasts": {"matched", "own_ensembles"},
    "ranges": {"simulated"},
    "printed_ranges": set(),
    "primary": {"simulated", "matched"},
    "shared_worlds": {"simulated", "matched"},
    "second_seeds": {"simulated", "matched", "own_ensembles"},
    "controls": {"simulated", "matched"},
    "printed_widths": {"simulated"},
    "every_row": {"three_judges", "simulated", "matched", "own_ensembles"},
    "urme": {"simulated", "matched"},
    "people": {"matched", "people"},
    "people_heads": {"matched", "people"},
}


class Evaluation(Section):
    """What a policy's return is the mean of."""

    prompts: Annotated[int, Field(ge=2, le=10**6)] = Field(description="the same for all, at most")
    samples: Annotated[int, Field(ge=2, le=10**4)] = Field(description="of each prompt")
    looks: list[Count] = []  # steps after which policies of the row of Figure 7 are evaluated as well


class Matching(Section):
    """How the variance-aware penalty is found that leaves as much KL as vanilla's."""

    # of vanilla's coefficient, tried in a pilot stack
    factors: Annotated[list[Positive], Field(min_length=1, max_length=100)]
    each: Count = 16  # policies with each, at most
    tolerance: Positive = 0.03  # of the KL, relative
    attempts: Count = 4  # stacks that may be trained


class Judge(Section):
    """A prompted judge behind an OpenAI-compatible endpoint."""

    model: Word = Field(description="its name at the endpoint")
    base_url: Annotated[Word, AfterValidator(_is_url)] | None = None  # of the endpoint; None is OpenAI's
    # the environment variable that holds the key
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    requests: Annotated[int, Field(ge=1, le=1000)] = 8  # at a time
    refusals_say_nothing: bool = False  # a text that it refuses gets the whole scale, else its stack stops
    reply_tokens: Annotated[int, Field(ge=1, le=10**6)] = 64  # at most; judges that reason aloud need more


JudgeName = Annotated[str, Field(pattern="^judge-[abc]$")]  # of the rows of Tables 1 to 3


class Policies(Section):
    """The policies that are trained, and what they are asked."""

    count: Annotated[int, Field(ge=1, le=10_000)] = Field(description="of each method; 80")
    runs: Annotated[list[RunGroup], Field(min_length=1)]  # see `experiments.conditions.GROUPS`
    data: Data = "embedded"  # where prompts come from: `embedded`, a file, or a hub data set
    judges: dict[JudgeName, Judge] = {}  # by name, judge-a to judge-c; simulated ones where there are none
    prompts: Count = Field(description="prompts that training draws from, at most")
    warm_up: Count = Field(description="reference responses for the critic and the unit of reward")
    evaluation: Evaluation
    matching: Matching
    critic: Literal["own_states", "reference_states"] = Field(description="see `vaalign_lib.training.critic`")
    sampling: Sampling
    training: Annotated[dict[str, PolicyTraining], ByArchitecture] = Field(description="by architecture")

    def asking(self, what: str) -> list[RunGroup]:
        """Return the groups of runs that ask for something; see `ASKS`."""
        return [group for group in self.runs if what in ASKS[group]]

    @model_validator(mode="after")
    def _judges_fit_the_runs(self) -> "Policies":
        """Judges are simulated in the embedded world and asked everywhere else."""
        if self.data == "embedded":
            if self.judges:
                raise ValueError("judges: in the embedded world they are simulated; name data too")
            return self
        if groups := ", ".join(self.asking("simulated")):
            raise ValueError(f"runs: {groups} need simulated judges, which only data: embedded has")
        if self.asking("people") == self.runs:
            return self
        asked = ("judge-a", "judge-b", "judge-c") if self.asking("three_judges") else ("judge-b",)
        if absent := [name for name in asked if name not in self.judges]:
            raise ValueError(f"judges: the runs ask {', '.join(absent)}, which have no model here")
        return self


class FeatureBench(Section):
    """Notebook 04: policies on stored responses, in worlds of their own, see `theory.feature_bench`."""

    worlds: Annotated[int, Field(ge=2, le=1000)] = 20
    prompts: Annotated[int, Field(ge=2, le=10**4)] = 96
    responses: Annotated[int, Field(ge=4, le=10**4)] = 160  # stored ones, of each prompt
    policies: Annotated[int, Field(ge=4, le=10**4)] = 80  # of each method in each world


class AttributeStudy(Section):
    """Notebook 06: URM and URME on the frozen backbone of notebook 03, and on a bench of several worlds."""

    seeds: Annotated[int, Field(ge=4, le=1000)] = 20
    members: Annotated[int, Field(ge=2, le=100)] = 3  # of a URME
    texts: Annotated[int, Field(ge=20, le=10**6)] = 6000  # rated ones, of which every seed takes its own
    texts_each: Annotated[int, Field(ge=10, le=10**6)] = 2000
    raters: Annotated[int, Field(ge=1, le=100)] = 3  # of a text
    test_texts: Annotated[int, Field(ge=20, le=10**6)] = 2000
    training: HeadTraining = HeadTraining(
        batch_size=256, learning_rate=0.02, optimizer="adamw_torch", weight_decay=0.001, scheduler="cosine",
        epochs=8,
    )  # fmt: skip
    gating: HeadTraining = HeadTraining(
        batch_size=128, learning_rate=0.003, optimizer="adamw_torch", weight_decay=0.001, scheduler="cosine",
        epochs=2,
    )  # fmt: skip
    gating_pairs: Annotated[int, Field(ge=10, le=10**6)] = 4000
    hidden: Count = 64  # units of a gating layer
    prompts: Annotated[int, Field(ge=2, le=10**4)] = 64  # of best-of-n
    samples: Annotated[int, Field(ge=4, le=10**4)] = 64  # responses to each
    bench_worlds: Annotated[int, Field(ge=2, le=1000)] = 12
    bench_policies: Annotated[int, Field(ge=4, le=10**4)] = 80
    bench_prompts: Annotated[int, Field(ge=2, le=10**4)] = 48
    bench_responses: Annotated[int, Field(ge=4, le=10**4)] = 80
    backbone_texts: Annotated[int, Field(ge=20, le=10**6)] = 800  # ratings that trained backbones learn from
    backbone: HeadTraining = HeadTraining(
        batch_size=32, learning_rate=1e-3, optimizer="adamw_torch", weight_decay=0.001, scheduler="cosine",
        epochs=2,
    )  # fmt: skip


class Frontier(Section):
    """Notebook 08: what methods and variances do on the feature bench, see `experiments.frontier`."""

    worlds: Annotated[int, Field(ge=3, le=1000)] = 20
    computed: Annotated[int, Field(ge=1, le=1000)] = 20  # of them; the rest as published, if they are
    prompts: Annotated[int, Field(ge=4, le=10**4)] = 32
    responses: Annotated[int, Field(ge=16, le=10**4)] = 64
    policies: Annotated[int, Field(ge=4, le=10**4)] = 40
    pairs: Annotated[int, Field(ge=64, le=10**5)] = 200  # a reward model learns from half of them
    members: Annotated[int, Field(ge=3, le=1000)] = 10  # heads of a reward model
    many: Annotated[int, Field(ge=3, le=10**4)] = 100  # where more are compared
    widths: list[Annotated[int, Field(ge=8, le=4096, multiple_of=2)]] = [32, 128]  # beside 64


class Raters(Section):
    """People's ratings, in place of judges."""

    words: Annotated[str, AfterValidator(_rated)] = Field(description="a file of lines, see `data.raters`")
    texts: Annotated[str, AfterValidator(_rated)] | None = None  # the same of whole texts


class TrlComparison(Section):
    """Notebook 09: PPO, RLOO and GRPO, in the embedded world whatever the profile."""

    seeds: Annotated[int, Field(ge=2, le=10_000)] = 2  # policies of each trainer and method
    matched_kl: bool = False  # whether variance-aware coefficients leave vanilla's KL, else they are its own
    steps: Count = 80
    completions: Count = 16  # of a step
    generations: Annotated[int, Field(ge=2, le=10_000)] = 4  # completions to a prompt
    learning_rate: Rate = 1.2e-3
    beta: Positive = 0.2  # of the KL penalty
    one_token_steps: Count = 160  # to the fixed points on one token

    _whole_groups = _multiple("completions", "generations")


class Robust(Section):
    """Notebook 07, in the embedded world whatever the profile."""

    toy_seeds: Annotated[int, Field(ge=4, le=10**5)] = 1000
    sweep_seeds: Annotated[int, Field(ge=4, le=10**5)] = 200  # of every other setting of the toy
    head_seeds: Annotated[int, Field(ge=2, le=1000)] = 20  # ensembles of Gaussian heads
    ensembles: Annotated[int, Field(ge=2, le=1000)] = 10  # that policies are trained on, by every rule
    steps: Annotated[int, Field(ge=4, le=10**5)] = 320  # of long training; short is a quarter of them
    repeats: Annotated[int, Field(ge=2, le=1000)] = 6  # policies of a kind, stochastic or fused
    bench: FeatureBench = FeatureBench(worlds=10, prompts=48, responses=64, policies=16)


class Profile(Section):
    """All sizes of a study."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$", max_length=100)]
    description: str
    bandit: Bandit
    theorems: Theorems
    reward_data: RewardData
    reference: Reference
    reward_model: RewardModel
    ensembles: Ensembles
    policies: Policies
    bench: FeatureBench = FeatureBench()
    frontier: Frontier = Frontier()
    trl: TrlComparison = TrlComparison()
    robust: Robust = Robust()
    attributes: AttributeStudy = AttributeStudy()
    true_reward: TrueReward = Field(description="`gold` in the embedded world, or a model's name or path")
    raters: Raters | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Where the profile names models and data, and what is named there."""
        models = {f"reference.models.{name}": model for name, model in self.reference.models.items()}
        others = ("reward_data.pairs", "reward_data.evaluation", "reward_model.backbone", "true_reward")
        named = models | {place: attrgetter(place)(self) for place in (*others, "policies.data")}
        if self.raters is None:
            return named
        rated = {f"raters.{name}": path for name, path in self.raters.model_dump(exclude_none=True).items()}
        return named | rated

    @model_validator(mode="after")
    def _people_have_rated_a_llama(self) -> "Profile":
        if groups := ", ".join(self.policies.asking("people")):
            if self.raters is None:
                raise ValueError(f"raters: missing; runs {groups} are judged by people")
            if self.policies.data == "embedded":
                raise ValueError(f"policies.data: runs {groups} need prompts of the world outside")
            for place, given in self._by_architecture.items():
                if LLAMA not in given:
                    raise ValueError(f"{place}.{LLAMA}: missing; runs {groups} train one")
        return self

    @property
    def _by_architecture(self) -> dict[str, dict[str, Any]]:
        return {"reference.models": self.reference.models, "policies.training": self.policies.training}

    @model_validator(mode="after")
    def _policies_can_be_trained(self) -> "Profile":
        matched = ", ".join(sorted(self.policies.asking("matched")))
        for name, training in self.policies.training.items():
            where, targets = f"policies.training.{name}", training.lora and training.lora.target_modules
            if name not in self.reference.models:
                raise ValueError(f"{where}: there is no reference.models.{name} to start from")
            kinds = LINEAR | {LLAMA: _LAYERS}
            known = kinds.get(_architecture_of(self.reference.models[name], name))
            if known and isinstance(targets, list) and (unknown := set(targets) - set(known)):
                text = f"expected all-linear, or of {', '.join(known)}, got {', '.join(sorted(unknown))}"
                raise ValueError(f"{where}.lora.target_modules: {text}")
            if matched and not training.ppo.init_kl_coef:
                text = f"runs {matched} multiply it until policies leave as much KL"
                raise ValueError(f"{where}.ppo.init_kl_coef: expected more than 0, for {text}")
        count, ensembles = self.policies.count, self.ensembles.independent
        if count > ensembles and (groups := ", ".join(sorted(self.policies.asking("own_ensembles")))):
            text = f"expected at least policies.count, {count}, got {ensembles}"
            raise ValueError(f"ensembles.independent: {text}: in runs {groups} every policy has its own")
        written = self.policies.sampling.max_new_tokens
        if "tiny" in self.reference.models.values() and written >= TINY_TOKENS:
            text = f"tiny policies read {TINY_TOKENS} tokens, prompt and response together, got {written}"
            raise ValueError(f"policies.sampling.max_new_tokens: {text}")
        return self


def _architecture_of(model: str, name: str) -> str:
    """Return what kind a model is, as far as is known without asking the hub, else nothing."""
    if model == "tiny":
        return name
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((Path(model) / "config.json").read_bytes())["model_type"])
    return ""


@dataclass(frozen=True)
class Study:
    """What every experiment takes: where results are kept, how large it is, and its seed."""

    store: RunStore
    profile: Profile
    seed: int = 0


def available_profiles() -> list[str]:
    """Return the names of the profiles that the project ships."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """Read a profile by name or from the path of a YAML file; raise `ProfileError` if it cannot be used."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(available_profiles())
        text = f"no profile {str(name)!r}: choose one of {known}, or give the path of a YAML file"
        raise ProfileError(text)
    try:
        profile = Profile.model_validate(_with_base(path), context={"folder": path.parent.resolve()})
    except ValidationError as error:
        raise ProfileError(f"{path}: {listed(error)}") from None
    shipped = PROFILES / f"{profile.name}.yaml"
    if shipped.is_file() and not shipped.samefile(path):
        text = f"name: {profile.name} is a shipped profile, with results of its own; choose another"
        raise ProfileError(f"{path}: {text}")
    return profile


def local_files(profile: Profile) -> dict[str, Any]:
    """Return, of every file and folder that a profile names, what a key covers; see `store.content_of`."""
    named = (Path(name) for name in profile.sources.values())
    return {str(path): content_of(path) for path in named if path.is_absolute() and path.exists()}


# --- files --------------------------------------------------------------------------------------------


def _with_base(path: Path) -> dict[str, Any]:
    """Read a YAML file; with `extends: NAME`, over what that shipped profile says."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: expected a mapping of keys to values")
    if (base := content.pop("extends", None)) is None:
        return content
    if base not in available_profiles() or PROFILES / f"{base}.yaml" == path:
        others = ", ".join(name for name in available_profiles() if name != path.stem)
        raise ProfileError(f"{path}: extends: expected one of {others}, got {base!r}")
    return _merged(_placed(_with_base(PROFILES / f"{base}.yaml")), content)


def _placed(content: Any) -> Any:
    """Return what a shipped profile says, for a file elsewhere: paths that lead up start where it lies."""
    if isinstance(content, dict):
        return {key: _placed(value) for key, value in content.items()}
    return str(PROFILES / content) if isinstance(content, str) and content.startswith("../") else content


class _Loader(yaml.SafeLoader):
    """YAML with the plain values of version 1.2: 1e5 is a number; 010, 1:30, yes and dates are texts."""


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", r"~|null|", ("~", "n", "")),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_pattern})$"), _first)


def read_yaml(path: Path) -> Any:
    """Read a YAML file, not too large, whose keys are texts, each once."""
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ProfileError(f"{path}: {size:,} bytes are no profile; expected at most {LARGEST_FILE:,}")
    try:
        loader = _Loader(path.read_bytes())
        if (node := loader.get_single_node()) is None:
            return None
        if _values(node, {}) > LARGEST_CONTENT:
            raise ValueError(f"aliases make more than {LARGEST_CONTENT:,} values of it")
        return loader.construct_document(node)
    except RecursionError:
        problem = "nested too deeply"
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", error))
        problem = " ".join([*([f"line {mark.line + 1}:"] if mark else []), *problem.split()])
    raise ProfileError(f"{path}: not valid YAML: {problem}")


def _values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return how many values a node stands for, aliases resolved; refuse what is no tree of texts."""
    if node in known:
        return known[node]
    known[node] = LARGEST_CONTENT + 1  # as long as it is open: an alias inside of what it stands for
    children: list[yaml.Node] = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if not key.tag.endswith((":str", ":merge")):
                _refuse(key, f"expected a word as key, got {key.value!r:.80}")
            if key.value in seen:
                _refuse(key, f"the key {key.value!r} is given twice")
            seen.add(key.value)
        children = [value for _, value in node.value]
    known[node] = 1 + sum(_values(child, known) for child in children)
    return known[node]


def _refuse(node: yaml.Node, problem: str) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def listed(error: ValidationError, root: type[Section] | None = None) -> str:
    """Return the first problems, each as key, what it held and what is allowed, and how many more.

    The keys are those of a profile, or of another section.
    """
    problems = [_explain(problem, root or Profile) for problem in error.errors()]
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS] + [f"and {more} more"] * (more > 0))


def _explain(problem: Any, root: type[Section]) -> str:
    where, section = ".".join(map(str, problem["loc"])), _section_at(problem["loc"][:-1], root)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; allowed here: {', '.join(section.model_fields)}"
    if problem["type"] == "missing" and isinstance(key := problem["loc"][-1], str):
        return f"{where}: missing; expected {section.model_fields[key].description or 'a value'}"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}".removeprefix(": ")
    return f"{where}: {problem['msg'].lower()}, got {reprlib.repr(problem['input'])}"


def _section_at(location: tuple[str | int, ...], section: type[Section]) -> type[Section]:
    for part in location:
        if field := section.model_fields.get(str(part)):  # else a key of a dictionary of sections
            kinds = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
            section = next((one for one in kinds if issubclass(one, Section)), section)
    return section
