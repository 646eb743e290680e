"""Profiles: how large the study runs. A YAML file each, validated; it says sizes, never behaviour.

What cannot run is refused when a profile is loaded, before anything starts: a value of another kind or
out of its bounds, a file that is not there, a part that is left out. Bounds are generous; what lies
beyond them is a slip of the hand.
"""

import json
import re
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, ValidationError, model_validator

from vaalign_lib.store import PROFILES, RunStore, content_of

LARGEST_FILE = 100_000  # bytes
LARGEST_CONTENT = 10_000  # values, those that an alias stands for counted each time
SHOWN_PROBLEMS = 4  # of a profile, in one line
OURS = ("embedded", "tiny", "tiny-gemma", "gold")  # what these name is made here
TINY_TOKENS = 64  # of prompt and response together, that a tiny policy can tell apart
_HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}(@[\w.-]+)?", re.ASCII)
_FILE_NAME = re.compile(
    r".*\.(jsonl?|ndjson|[ct]sv|xlsx|parquet|arrow|txt|gz|zst|bz2|xz|zip|tar|safetensors|bin|pt|gguf)",
    re.IGNORECASE,
)
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEAR = {  # layers that can have adapters, by architecture
    "gpt2": ("c_attn", "c_fc", "c_proj"),
    "qwen2": _LAYERS,
    "mistral": _LAYERS,
}


class ProfileError(ValueError):
    """A profile that does not exist or says something impossible."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --- kinds of values ----------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1, le=10**7)]
Draws = Annotated[int, Field(ge=100, le=10**7)]
ManyDraws = Annotated[int, Field(ge=20_000, le=10**8)]  # so that rare events are drawn
Instances = Annotated[int, Field(ge=20, le=10**6)]  # so that intervals exist
# of hidden states, which heads divide, two of policies and four of reward models; halves are rotated
PolicyWidth = Annotated[int, Field(ge=4, le=4096, multiple_of=4)]
RewardWidth = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
Rate = Annotated[float, Field(ge=1e-10, le=1)]  # of learning
Share = Annotated[float, Field(ge=1e-10, le=1)]
Positive = Annotated[float, Field(ge=1e-10, le=1e6)]
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Epochs = Annotated[float, Field(ge=1e-10, le=1000)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]
Moment = Annotated[float, Field(ge=0, lt=1)]  # the decay of one of Adam's
Word = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]  # without spaces around it, in one line
Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw_torch", "paged_adamw_32bit"]
Scheduler = Literal["cosine", "constant"]


def _named(word: str, folders: bool) -> AfterValidator:
    """Accept our own word, a name on the hub, or a file, or folder, that is there."""
    kind = "folder" if folders else "file"

    def check(value: str) -> str:
        expected = f"expected {word}, a name on the hub, or a {kind}"
        if value == word:
            return value
        if value in OURS:
            raise ValueError(f"{expected}, got {value!r}, which is made here for something else")
        path = Path(value)
        if value and _exists(path):
            if folders != path.is_dir():
                raise ValueError(f"{expected}; {path} is a {'file' if folders else 'folder'}")
            if folders and not (path / "config.json").is_file():
                raise ValueError(f"{expected}; {path} has no config.json")
        elif not _is_hub_name(value) or not (folders or "/" in value):
            raise ValueError(f"{expected}; there is no such {kind}: {value!r:.200}")
        return value

    return AfterValidator(check)


def _is_hub_name(value: str) -> bool:
    return bool(_HUB_NAME.fullmatch(value)) and not _FILE_NAME.fullmatch(value)


def _exists(path: Path) -> bool:
    with suppress(OSError, ValueError):  # a name that is too long, or holds a zero
        return path.exists()
    return False


def _is_url(value: str) -> str:
    try:
        HttpUrl(value)
    except ValidationError:
        raise ValueError(
            f"expected the URL of an endpoint, such as http://localhost:8000/v1, got {value!r:.200}"
        ) from None
    return value


def _of_all_three(value: dict[str, Any]) -> dict[str, Any]:
    if set(value) != set(LINEAR):
        raise ValueError(
            f"expected all of {', '.join(LINEAR)} and no other, got {', '.join(value) or 'none'}"
        )
    return value


Data = Annotated[str, _named("embedded", folders=False)]
ByArchitecture = AfterValidator(_of_all_three)


# --- sections -----------------------------------------------------------------------------------------


class Bandit(Section):
    """Notebook 01."""

    draws: Draws = Field(description="draws of the estimates in Figure 3; the paper has 1,000")
    many_draws: ManyDraws = Field(description="draws beside them, for the risks themselves")


class Theorems(Section):
    """Notebook 02."""

    draws: Annotated[int, Field(ge=1000, le=10**7)] = Field(
        description="draws of the estimates per probability"
    )
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

    models: Annotated[dict[str, Annotated[str, _named("tiny", folders=True)]], ByArchitecture] = Field(
        description="architecture: `tiny`, or a name or path"
    )
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

    backbone: Annotated[str, _named("tiny-gemma", folders=True)] = Field(
        description="`tiny-gemma`, or a model's name or path"
    )
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
    weight_decay: Coefficient
    scheduler: Scheduler
    epochs: Epochs
    anchor: Positive = Field(default=1.0, description="prior precision of anchored heads")


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
    top_k: Annotated[int, Field(ge=0, le=10**7)] = Field(default=50, description="0 keeps all")
    top_p: Share = 0.9
    min_new_tokens: Annotated[int, Field(ge=0)] = 8
    max_new_tokens: Count = 32
    log_probability_temperature: Temperature = Field(
        default=1.5,
        description="of the log-probabilities, untruncated: the temperature above, or 1 as in TRL",
    )

    @model_validator(mode="after")
    def _can_end(self) -> "Sampling":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} must not be above max_new_tokens "
                f"{self.max_new_tokens}: no response could end"
            )
        return self


class AdaptiveKL(Section):
    """The controller of the KL coefficient."""

    target: Positive = Field(description="nats per response")
    horizon: Positive = Field(description="responses")


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
    ratio_threshold: Positive = Field(default=10.0, description="mean ratio above which a pass's loss is 0")

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
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[Word], Field(min_length=1)] | None = Field(
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
        try:
            self.settings("variance_aware")
        except ValidationError as error:
            raise ValueError(f"variance_aware: {_listed(error)}") from None
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

OWN_ENSEMBLES: tuple[RunGroup, ...] = ("independent", "second_seeds", "every_row")  # policy by policy
MATCHED: tuple[RunGroup, ...] = (  # groups whose penalty is chosen for a KL
    "matched_kl",
    "independent",
    "primary",
    "second_seeds",
    "controls",
    "every_row",
)


class Evaluation(Section):
    """What a policy's return is the mean of."""

    prompts: Annotated[int, Field(ge=2, le=10**6)] = Field(description="the same for all, at most")
    samples: Annotated[int, Field(ge=2, le=10**4)] = Field(description="of each prompt")


class Matching(Section):
    """How the variance-aware penalty is found that leaves as much KL as vanilla's."""

    factors: Annotated[list[Positive], Field(min_length=1, max_length=100)] = Field(
        description="of vanilla's coefficient, tried in a pilot stack"
    )
    tolerance: Positive = Field(default=0.03, description="of the KL, relative")
    attempts: Count = Field(default=4, description="stacks that may be trained")


class Judge(Section):
    """A prompted judge behind an OpenAI-compatible endpoint."""

    model: Word = Field(description="its name at the endpoint")
    base_url: Annotated[Word, AfterValidator(_is_url)] | None = Field(
        default=None, description="of the endpoint; None is OpenAI's"
    )
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the key"
    )
    requests: Annotated[int, Field(ge=1, le=1000)] = Field(default=8, description="at a time")
    refusals_say_nothing: bool = Field(
        default=False,
        description="whether a text that it refuses gets the whole scale; otherwise its stack stops",
    )
    reply_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=64, description="of a reply, at most; judges that reason aloud need more"
    )


JudgeName = Annotated[str, Field(pattern="^judge-[abc]$")]  # of the rows of Tables 1 to 3
_ALL_JUDGES = ("rows", "printed_rows", "every_row")  # groups that ask all three, others only judge-b
_SIMULATED = (  # groups whose judges are each policy's own, stretched, or of another world
    "independent",
    "primary",
    "second_seeds",
    "controls",
    "printed_widths",
    "every_row",
)


class Policies(Section):
    """The policies that are trained, and what they are asked."""

    count: Annotated[int, Field(ge=1, le=10_000)] = Field(description="of each method; 80")
    runs: Annotated[list[RunGroup], Field(min_length=1)] = Field(
        description="which are trained; see `vaalign_lib.experiments.conditions.GROUPS`"
    )
    data: Data = Field(
        default="embedded", description="where prompts come from: `embedded`, a file, or a hub data set"
    )
    judges: dict[JudgeName, Judge] = Field(
        default={}, description="by name, judge-a to judge-c; simulated ones where there are none"
    )
    prompts: Count = Field(description="prompts that training draws from, at most")
    warm_up: Count = Field(description="reference responses for the critic and the unit of reward")
    evaluation: Evaluation
    matching: Matching
    critic: Literal["own_states", "reference_states"] = Field(description="see `vaalign_lib.training.critic`")
    sampling: Sampling
    training: Annotated[dict[str, PolicyTraining], ByArchitecture] = Field(description="by architecture")

    @model_validator(mode="after")
    def _judges_fit_the_runs(self) -> "Policies":
        """Judges are simulated in the embedded world and asked everywhere else."""
        if self.data == "embedded":
            if self.judges:
                raise ValueError("judges: in the embedded world they are simulated; name data too")
            return self
        if groups := [group for group in self.runs if group in _SIMULATED]:
            raise ValueError(
                f"runs: {', '.join(groups)} need simulated judges, which only data: embedded has"
            )
        asked = ("judge-a", "judge-b", "judge-c") if set(self.runs) & set(_ALL_JUDGES) else ("judge-b",)
        if absent := [name for name in asked if name not in self.judges]:
            raise ValueError(f"judges: the runs ask {', '.join(absent)}, which have no model here")
        return self


class TrlComparison(Section):
    """Notebook 09: PPO, RLOO and GRPO, in the embedded world whatever the profile."""

    seeds: Annotated[int, Field(ge=2, le=10_000)] = Field(
        default=2, description="policies of each trainer and method"
    )
    matched_kl: bool = Field(
        default=False,
        description="whether the variance-aware coefficient is chosen for vanilla's KL; else both have "
        "the same, times variances with mean 1",
    )
    steps: Count = 80
    completions: Count = Field(default=16, description="of a step")
    generations: Annotated[int, Field(ge=2, le=10_000)] = Field(
        default=4, description="completions to a prompt"
    )
    learning_rate: Rate = 1.2e-3
    beta: Positive = Field(default=0.2, description="of the KL penalty")
    one_token_steps: Count = Field(default=160, description="to the fixed points on one token")

    @model_validator(mode="after")
    def _whole_groups(self) -> "TrlComparison":
        if self.completions % self.generations:
            raise ValueError(
                f"completions {self.completions} must be a multiple of generations {self.generations}"
            )
        return self


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
    trl: TrlComparison = TrlComparison()
    true_reward: Annotated[str, _named("gold", folders=True)] = Field(
        description="`gold` in the embedded world, or a model's name or path"
    )

    @model_validator(mode="after")
    def _known_layers(self) -> "Profile":
        for name, training in self.policies.training.items():
            targets = training.lora.target_modules if training.lora else None
            known = LINEAR.get(_architecture_of(self.reference.models[name], name))
            if known and isinstance(targets, list) and (unknown := set(targets) - set(known)):
                raise ValueError(
                    f"policies.training.{name}.lora.target_modules: expected all-linear, or of "
                    f"{', '.join(known)}, got {', '.join(sorted(unknown))}"
                )
        return self

    @model_validator(mode="after")
    def _ensemble_for_each(self) -> "Profile":
        count, known = self.policies.count, self.ensembles.independent
        if count > known and (groups := set(self.policies.runs) & set(OWN_ENSEMBLES)):
            raise ValueError(
                f"ensembles.independent: expected at least policies.count, {count}, got {known}: in runs "
                f"{', '.join(sorted(groups))} every policy has its own"
            )
        return self

    @model_validator(mode="after")
    def _short_enough(self) -> "Profile":
        written = self.policies.sampling.max_new_tokens
        if "tiny" in self.reference.models.values() and written >= TINY_TOKENS:
            raise ValueError(
                f"policies.sampling.max_new_tokens: tiny policies read {TINY_TOKENS} tokens, prompt and "
                f"response together, got {written}"
            )
        return self

    @model_validator(mode="after")
    def _can_match(self) -> "Profile":
        matched = set(self.policies.runs) & set(MATCHED)
        for name, training in self.policies.training.items():
            if matched and not training.ppo.init_kl_coef:
                raise ValueError(
                    f"policies.training.{name}.ppo.init_kl_coef: expected more than 0, for runs "
                    f"{', '.join(sorted(matched))} multiply it until policies leave as much KL"
                )
        return self


def _architecture_of(model: str, name: str) -> str:
    """Return what kind a model is, as far as is known without asking the hub, else nothing."""
    if model == "tiny":
        return name
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((Path(model) / "config.json").read_bytes())["model_type"])
    return ""


# --- files --------------------------------------------------------------------------------------------


_SOURCES = (  # where a profile names files or folders; * stands for every key
    ("reward_data", "pairs"),
    ("reward_data", "evaluation"),
    ("reference", "models", "*"),
    ("reward_model", "backbone"),
    ("true_reward",),
    ("policies", "data"),
)


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
        profile = Profile.model_validate(_with_base(path))
    except ValidationError as error:
        raise ProfileError(f"{path}: {_listed(error)}") from None
    shipped = PROFILES / f"{profile.name}.yaml"
    if shipped.is_file() and not shipped.samefile(path):
        raise ProfileError(
            f"{path}: name: {profile.name} is a shipped profile, with results of its own; choose another"
        )
    return profile


def _from_folder(content: dict[str, Any], folder: Path) -> None:
    """Make paths that a profile names relative to its own folder absolute."""
    for *sections, key in _SOURCES:
        place: Any = content
        for section in sections:
            place = place.get(section, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            continue
        for name in list(place) if key == "*" else [key] if key in place else []:
            value = place[name]
            if not isinstance(value, str) or value in ("", *OURS):
                continue
            path = folder.resolve() / value
            if _exists(path):
                place[name] = str(path.resolve())
            elif not _is_hub_name(value):
                place[name] = str(path)


def local_files(profile: Profile) -> dict[str, Any]:
    """Return, of every file and folder that a profile names, what a key covers; see `store.content_of`."""
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
    content = _read(path)
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: expected a mapping of keys to values")
    _from_folder(content, path.parent)
    if (base := content.pop("extends", None)) is None:
        return content
    if base not in available_profiles() or PROFILES / f"{base}.yaml" == path:
        others = ", ".join(name for name in available_profiles() if name != path.stem)
        raise ProfileError(f"{path}: extends: expected one of {others}, got {base!r}")
    return _merged(_with_base(PROFILES / f"{base}.yaml"), content)


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


def _read(path: Path) -> Any:
    """Read a YAML file whose keys are texts, each once.

    Raises:
        ProfileError: it is something else, or too large.
    """
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ProfileError(f"{path}: {size:,} bytes are no profile; expected at most {LARGEST_FILE:,}")
    try:
        loader = _Loader(path.read_bytes())
        if (node := loader.get_single_node()) is None:
            return None
        if _values(node, {}) > LARGEST_CONTENT:
            raise ValueError(f"aliases make more than {LARGEST_CONTENT:,} values of it")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ProfileError(f"{path}: not valid YAML: {line}{error.problem}") from None
    except RecursionError:
        raise ProfileError(f"{path}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ProfileError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


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
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
        field = _section_at(problem["loc"][:-1]).model_fields[str(problem["loc"][-1])]
        return f"{where}: missing; expected {field.description or 'a value'}"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}".removeprefix(": ")
    return f"{where}: {problem['msg'].lower()}, got {reprlib.repr(problem['input'])}"


def _section_at(location: tuple[str | int, ...]) -> type[Section]:
    section: type[Section] = Profile
    for part in location:
        if str(part) not in section.model_fields:
            continue  # a key of a dictionary of sections
        annotation = section.model_fields[str(part)].annotation
        kinds = (annotation, *get_args(annotation))
        sections = [one for one in kinds if isinstance(one, type) and issubclass(one, Section)]
        section = sections[0] if sections else section
    return section


PUBLISHED_PROFILE = "embedded"  # its figures and tables are committed
