"""Profiles: how large the study runs. A YAML file each, validated; it says sizes, never behaviour."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vaalign_lib.paths import PROFILES
from vaalign_lib.runs import content_of

Draws = Annotated[int, Field(ge=100, strict=True)]
ManyDraws = Annotated[int, Field(ge=20_000, strict=True)]  # so that rare events are drawn
Instances = Annotated[int, Field(ge=20, strict=True)]  # so that intervals exist
SHOWN_PROBLEMS = 4  # of a profile, in one line


class ProfileError(ValueError):
    """A profile that does not exist or says something impossible."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bandit(Section):
    """Notebook 01."""

    draws: Draws = Field(description="draws of the estimates in Figure 3; the paper has 1,000")
    many_draws: ManyDraws = Field(description="draws beside them, for the risks themselves")


class Theorems(Section):
    """Notebook 02."""

    draws: Annotated[int, Field(ge=1000, strict=True)] = Field(
        description="draws of the estimates per probability"
    )
    instances: Instances = Field(description="random problems per search or scatter plot")
    settings: Instances = Field(description="random settings per distribution of Figure 4's ratio")


Count = Annotated[int, Field(ge=1, strict=True)]
Rate = Annotated[float, Field(gt=0)]
Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw_torch", "paged_adamw_32bit"]
Scheduler = Literal["cosine", "constant"]


class RewardData(Section):
    """Preference pairs, for training the reward models and for looking at them."""

    pairs: str = Field(description="`embedded`, a .jsonl file, or a hub data set")
    evaluation: str = Field(description="`embedded`, a .jsonl file, or a hub data set")
    train_pairs: Count = Field(description="embedded pairs to learn from, for each stage")
    held_out_pairs: Count = Field(description="pairs for the temperature of the variances")
    evaluation_pairs: Count = Field(description="embedded pairs per category to look at")


class Reference(Section):
    """The policies that all others start from, and what the corpus of the tiny ones is."""

    models: dict[str, str] = Field(description="architecture: `tiny`, or a name or path")
    width: Count = Field(description="of the hidden states of the tiny ones")
    responses: Count = Field(description="of the supervised corpus")
    epochs: Rate
    batch_size: Count
    learning_rate: Rate
    prompts: Count = Field(description="prompts of best-of-n and the exponential tilt")
    samples: Annotated[int, Field(ge=8, strict=True)] = Field(description="responses to each")


class Pretrained(Section):
    """Stage 1 for a pretrained backbone, in a profile whose settings are those of tiny ones."""

    learning_rate: Rate
    epochs: Rate
    device_batch_size: Count
    max_length: Count


class RewardModel(Section):
    """Stage 1, Table 5: one reward model with one head."""

    backbone: str = Field(description="`tiny-gemma`, or a model's name or path")
    width: Count = Field(description="of the hidden states of `tiny-gemma`")
    batch_size: Count = Field(description="effective, over all steps of accumulation")
    device_batch_size: Count = Field(description="of one forward pass")
    learning_rate: Rate
    optimizer: Optimizer
    weight_decay: Annotated[float, Field(ge=0)]
    scheduler: Scheduler
    epochs: Rate
    loss_threshold: Rate = Field(description="logged loss at which training stops")
    logging_steps: Count = Field(description="steps over which the logged loss is averaged")
    max_length: Count = Field(description="tokens of prompt and response together")
    gradient_checkpointing: bool
    pretrained: Pretrained | None = Field(
        default=None, description="instead of these where another backbone is given"
    )

    @model_validator(mode="after")
    def _whole_steps(self) -> "RewardModel":
        if self.batch_size % self.device_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of device_batch_size "
                f"{self.device_batch_size}"
            )
        return self


class HeadTraining(Section):
    """Stage 2, Table 7: heads on the frozen backbone."""

    batch_size: Count
    learning_rate: Rate
    optimizer: Optimizer
    weight_decay: Annotated[float, Field(ge=0)]
    scheduler: Scheduler
    epochs: Rate
    anchor: Rate = Field(default=1.0, description="prior precision of anchored heads")


class Ensembles(Section):
    """Notebook 03: which ensembles are trained and how large they are."""

    members: Annotated[int, Field(ge=2, strict=True)] = Field(description="of an ensemble; 10")
    paper: HeadTraining = Field(description="Table 7's recipe")
    trained: HeadTraining = Field(description="the same for heads that are trained to the end")
    independent: Count = Field(description="ensembles of the `independent` protocol; 80")
    independent_pairs: Count = Field(description="pairs of each of them")
    backbones: HeadTraining = Field(description="for separately trained small backbones")
    backbone_pairs: Count = Field(description="pairs of each of them")
    backbone_width: Count = Field(description="of those")


class Sampling(Section):
    """How policies write, Table 18."""

    temperature: Rate = 1.5
    top_k: Annotated[int, Field(ge=0, strict=True)] = Field(default=50, description="0 keeps all")
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    min_new_tokens: Annotated[int, Field(ge=0, strict=True)] = 8
    max_new_tokens: Count = 32
    log_probability_temperature: Rate = Field(
        default=1.5,
        description="of the log-probabilities, untruncated: the temperature above, or 1 as in TRL",
    )


class AdaptiveKL(Section):
    """The controller of the KL coefficient."""

    target: Rate = Field(description="nats per response")
    horizon: Rate = Field(description="responses")


class PPO(Section):
    """Hyperparameters of PPO by the names of trl 0.11, with its defaults but a constant coefficient."""

    iterations: Count = Field(description="batches of responses")
    batch_size: Count = 128
    mini_batch_size: Count = Field(default=128, description="responses of one pass")
    gradient_accumulation_steps: Count = Field(default=1, description="passes of one update")
    ppo_epochs: Count = 4
    learning_rate: Rate = 1.41e-5
    schedule: Literal["constant", "linear"] = Field(
        default="constant", description="of the learning rate; `linear` falls to 0 at the end"
    )
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Rate | None = None
    init_kl_coef: Annotated[float, Field(ge=0)] = 0.2
    adaptive_kl: AdaptiveKL | None = None
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    gamma: Rate = 1.0
    lam: Rate = 0.95
    cliprange: Rate = 0.2
    cliprange_value: Rate = 0.2
    vf_coef: Annotated[float, Field(ge=0)] = 0.1
    ratio_threshold: Rate = Field(
        default=10.0, description="mean ratio above which a pass's loss is 0"
    )

    @model_validator(mode="after")
    def _whole_batches(self) -> "PPO":
        update = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % update:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of mini_batch_size times "
                f"gradient_accumulation_steps, {update}"
            )
        return self


class Lora(Section):
    """Adapters over a frozen base, Tables 16 and 17; names as in peft's LoraConfig."""

    r: Count
    lora_alpha: Rate
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] | None = Field(
        default=None, description="None takes peft's choice for the architecture"
    )
    four_bit: bool = Field(default=False, description="whether the base is held in 4 bits")


class PolicyTraining(Section):
    """How policies of one architecture are trained."""

    lora: Lora | None = Field(default=None, description="None trains all weights")
    precision: Precision = Field(
        default="float32", description="of products; trained weights stay in float32"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="whether updates compute activations twice to save memory"
    )
    ppo: PPO
    variance_aware: dict[str, Any] = Field(
        default={}, description="what differs for variance-aware PPO, where a table says so"
    )

    @model_validator(mode="after")
    def _known(self) -> "PolicyTraining":
        if unknown := set(self.variance_aware) - set(PPO.model_fields):
            raise ValueError(f"variance_aware: unknown {', '.join(sorted(unknown))}")
        PPO.model_validate(self.ppo.model_dump() | self.variance_aware)
        return self

    def settings(self, objective: str) -> PPO:
        """Return the settings of PPO for an objective."""
        if not objective.startswith("variance_aware"):
            return self.ppo
        return PPO.model_validate(self.ppo.model_dump() | self.variance_aware)


RunGroup = Literal[
    "rows",
    "printed_rows",
    "matched_kl",
    "independent",
    "ranges",
    "primary",
    "second_seeds",
    "controls",
    "printed_widths",
    "every_row",
]


class Evaluation(Section):
    """What a policy's return is the mean of."""

    prompts: Annotated[int, Field(ge=2, strict=True)] = Field(
        description="the same for all, at most"
    )
    samples: Annotated[int, Field(ge=2, strict=True)] = Field(description="of each prompt")


class Matching(Section):
    """How the variance-aware penalty is found that leaves as much KL as vanilla's."""

    factors: list[Rate] = Field(description="of vanilla's coefficient, tried in a pilot stack")
    tolerance: Rate = Field(default=0.03, description="of the KL, relative")
    attempts: Count = Field(default=4, description="stacks that may be trained")


class Judge(Section):
    """A prompted judge behind an OpenAI-compatible endpoint."""

    model: str = Field(description="its name at the endpoint")
    base_url: str | None = Field(default=None, description="of the endpoint; None is OpenAI's")
    key_variable: str = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the key"
    )
    requests: Count = Field(default=8, description="at a time")
    refusals_say_nothing: bool = Field(
        default=False,
        description="whether a text that it does not judge gets the whole scale; otherwise its stack "
        "stops there",
    )


class Policies(Section):
    """The policies that are trained, and what they are asked."""

    count: Count = Field(description="of each method; 80")
    runs: list[RunGroup] = Field(
        description="which are trained; see `vaalign_lib.policy_study.GROUPS`"
    )
    data: str = Field(
        default="embedded",
        description="where prompts come from: `embedded`, a .jsonl file, or a hub data set",
    )
    judges: dict[str, Judge] = Field(
        default={}, description="by name, judge-a to judge-c; simulated ones where there are none"
    )
    prompts: Count = Field(description="prompts that training draws from, at most")
    warm_up: Count = Field(description="reference responses for the critic and the unit of reward")
    evaluation: Evaluation
    matching: Matching
    critic: Literal["own_states", "reference_states"] = Field(
        description="see `vaalign_lib.critics`"
    )
    sampling: Sampling
    training: dict[str, PolicyTraining] = Field(description="by architecture")


class TrlComparison(Section):
    """Notebook 09: PPO, RLOO and GRPO, in the embedded world whatever the profile."""

    seeds: Annotated[int, Field(ge=2, strict=True)] = Field(
        default=2, description="policies of each trainer and method"
    )
    matched_kl: bool = Field(
        default=False,
        description="whether the variance-aware coefficient is chosen for vanilla's KL; else both have "
        "the same, times variances with mean 1",
    )
    steps: Count = 80
    completions: Count = Field(default=16, description="of a step")
    generations: Annotated[int, Field(ge=2, strict=True)] = Field(
        default=4, description="completions to a prompt"
    )
    learning_rate: Rate = 1.2e-3
    beta: Rate = Field(default=0.2, description="of the KL penalty")
    one_token_steps: Count = Field(default=160, description="to the fixed points on one token")


class Profile(Section):
    """All sizes of a study."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    description: str
    bandit: Bandit
    theorems: Theorems
    reward_data: RewardData
    reference: Reference
    reward_model: RewardModel
    ensembles: Ensembles
    policies: Policies
    trl: TrlComparison = TrlComparison()
    true_reward: str = Field(description="`gold` in the embedded world, or a model's name or path")


_SOURCES = (  # where a profile names files or folders; * stands for every key
    ("reward_data", "pairs"),
    ("reward_data", "evaluation"),
    ("reference", "models", "*"),
    ("reward_model", "backbone"),
    ("true_reward",),
    ("policies", "data"),
)


OURS = ("embedded", "tiny", "tiny-gemma", "gold")  # what these name is made here


def available_profiles() -> list[str]:
    """Return the names of the profiles that the project ships."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """Read a profile by name (`smoke`, `embedded`, `paper`) or from the path of a YAML file.

    Raises:
        ProfileError: there is no such profile, or a key or value in it is not allowed.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise ProfileError(
            f"no profile {str(name)!r}: choose one of {', '.join(available_profiles())}, "
            "or give the path of a YAML file"
        )
    try:
        content = _with_base(path)
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not valid YAML: {error}") from None
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        raise ProfileError(f"{path}: {_listed(error)}") from None


def _from_folder(content: dict[str, Any], folder: Path) -> None:
    """Make paths that a profile names relative to its own folder absolute."""
    for *sections, key in _SOURCES:
        place: Any = content
        for section in sections:
            place = place.get(section, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            continue
        for name in list(place) if key == "*" else [key] if key in place else []:
            named = isinstance(place[name], str) and place[name] not in OURS
            if named and (folder / place[name]).exists():
                place[name] = str((folder / place[name]).resolve())


def local_files(profile: Profile) -> dict[str, Any]:
    """Return, of every file and folder that a profile names, what a key covers; see `runs.content_of`."""
    content, found = profile.model_dump(), {}
    for *sections, key in _SOURCES:
        place = content
        for section in sections:
            place = place[section]
        for value in place.values() if key == "*" else [place[key]]:
            if Path(value).is_absolute() and Path(value).exists():
                found[value] = content_of(value)
    return found


def _with_base(path: Path) -> dict[str, Any]:
    """Read a YAML file; with `extends: NAME`, over what that shipped profile says."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: expected a mapping of keys to values")
    _from_folder(content, path.parent)
    if (base := content.pop("extends", None)) is None:
        return content
    if base not in available_profiles() or PROFILES / f"{base}.yaml" == path:
        others = ", ".join(name for name in available_profiles() if name != path.stem)
        raise ProfileError(f"{path}: extends: expected one of {others}, got {base!r}")
    return _merged(_with_base(PROFILES / f"{base}.yaml"), content)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _listed(error: ValidationError) -> str:
    """Return the first problems, each as key, what it held and what is allowed, and how many more."""
    problems = [_explain(problem) for problem in error.errors()]
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS] + [f"and {more} more"] * (more > 0))


def _explain(problem: Any) -> str:
    """Say which key is wrong, what it held and what is allowed."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = _section_at(problem["loc"][:-1])
        return f"{where}: unknown key; allowed here: {', '.join(section.model_fields)}"
    if problem["type"] == "missing":
        field = _section_at(problem["loc"][:-1]).model_fields[str(problem["loc"][-1])]
        return f"{where}: missing; expected {field.description or 'a value'}"
    return f"{where}: {problem['msg'].lower()}, got {problem['input']!r}"


def _section_at(location: tuple[str | int, ...]) -> type[Section]:
    section: type[Section] = Profile
    for part in location:
        if str(part) not in section.model_fields:
            continue  # a key of a dictionary of sections
        annotation = section.model_fields[str(part)].annotation
        section = next(
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, Section)
        )
    return section
