"""The Hugging Face hub, asked once whether it answers."""

import logging
import os
from functools import cache
from pathlib import Path
from threading import Thread

from huggingface_hub import constants, get_session, is_offline_mode

SECONDS = 8  # in which it must answer
_log = logging.getLogger(__name__)


def ask_hub(name: str | Path) -> None:
    """Make sure that the hub answers before its libraries ask half a minute for every name that is no folder
    here; else this process and those that it starts take what was loaded before.
    """
    if not Path(name).exists() and not is_offline_mode() and (failure := _failure()):
        _log.info("the hub does not answer (%s): what was loaded before is taken", failure)
        import datasets  # here, for it takes a second

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@cache
def _failure() -> str:
    """Return why the hub does not answer, or nothing."""
    found = [f"no answer in {SECONDS} seconds"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            found[0] = ""
        except Exception as error:
            found[0] = f"{type(error).__name__}: {error}"

    asking = Thread(target=ask, daemon=True)  # each of many addresses has a time-out of its own
    asking.start()
    asking.join(SECONDS)
    return found[0]
