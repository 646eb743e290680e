"""Profiles: how large the study runs. A YAML file each, validated; it says sizes, never behaviour."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vaalign_lib.paths import PROFILES

Draws = Annotated[int, Field(ge=100, strict=True)]
ManyDraws = Annotated[int, Field(ge=20_000, strict=True)]  # so that rare events are drawn
Instances = Annotated[int, Field(ge=20, strict=True)]  # so that intervals exist


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


class Profile(Section):
    """All sizes of a study."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    description: str
    bandit: Bandit
    theorems: Theorems


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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: expected a mapping of keys to values")
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ProfileError(f"{path}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(problem: Any) -> str:
    """Say which key is wrong, what it held and what is allowed."""
    where = ".".join(str(part) for part in problem["loc"])
    section = _section_at(problem["loc"][:-1])
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; allowed here: {', '.join(section.model_fields)}"
    if problem["type"] == "missing":
        field = section.model_fields[str(problem["loc"][-1])]
        return f"{where}: missing; expected {field.description or 'a value'}"
    return f"{where}: {problem['msg'].lower()}, got {problem['input']!r}"


def _section_at(location: tuple[str | int, ...]) -> type[Section]:
    section: type[Section] = Profile
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, Section)
        section = annotation
    return section
