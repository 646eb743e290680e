"""Reference policies of the study, made now or before."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from vaalign_lib.jobs import check_workers, start_processes
from vaalign_lib.policies.reference import write_reference
from vaalign_lib.profiles import Study


def reference(study: Study, architecture: str) -> Path:
    """Return a reference policy: the folder of a tiny one, trained now or before, or what the profile
    names, a folder or a model of the hub.
    """
    if (name := study.profile.reference.models[architecture]) != "tiny":
        return Path(name)
    sizes = study.profile.reference.model_dump(exclude={"models", "prompts", "samples"})
    config = {"architecture": architecture, "world_seed": study.seed, "seed": study.seed, **sizes}
    return study.store.folder(f"reference-{architecture}", write_reference, config)


def start_references(study: Study, architectures: Sequence[str], workers: int) -> dict[str, "Future[Path]"]:
    """Begin training reference policies in processes beside this one; return the folders to come."""
    check_workers(workers)
    if isinstance(workers, str):
        raise ValueError(f"workers: expected a number of processes of this machine, got {workers!r}")
    count = max(1, min(workers - 1, len(architectures)))
    pool = start_processes(count, together=count + 1)
    futures = {one: pool.submit(reference, study, one) for one in architectures}
    pool.shutdown(wait=False)
    return futures


def stack_seed(seed: int, repeat: int) -> int:
    """Return the seed of a whole stack; that of the first is the study's."""
    return seed + 1_000_003 * repeat
