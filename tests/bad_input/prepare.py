"""What rows need beside text: models, tokenizers, archives, servers.

A plain function writes files into the folder it is given; it runs once, and every row that names it gets
a copy. A generator function runs for each row, yields once (the row has what it yields as `prepared`),
and goes on when the row is over.
"""

from pathlib import Path

import yaml

from tests.bad_input.policy_parts import policies as policies  # a generator function, see there
from vaalign_lib.paths import PROFILES

# --- profiles -----------------------------------------------------------------------------------------


def smoke_without(folder: Path, *place: str) -> None:
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text()) | {"name": "mine"}
    *sections, key = place
    section = content
    for name in sections:
        section = section[name]
    del section[key]
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))


def without_mistral(folder: Path) -> None:
    smoke_without(folder, "policies", "training", "mistral")


def without_model(folder: Path) -> None:
    smoke_without(folder, "reference", "models", "gpt2")


def without_true_reward(folder: Path) -> None:
    smoke_without(folder, "true_reward")


def large_profile(folder: Path) -> None:
    (folder / "mine.yaml").write_text("extends: smoke\nname: mine\n" + "# much\n" * 500_000)


def deep_profile(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: " + "[" * 40_000)
