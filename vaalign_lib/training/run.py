"""From a profile to policies in training: which model, which form, which hyperparameters."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from vaalign_lib.data.world.world import World
from vaalign_lib.jobs import report
from vaalign_lib.models import load_tokenizer
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Lora, Profile, Sampling
from vaalign_lib.rewards.base import RewardSource
from vaalign_lib.store import Checkpoints
from vaalign_lib.training.evaluation import Evaluator
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.ppo import Trainer

if TYPE_CHECKING:
    from peft import LoraConfig

ANSWERS = "answers.parquet"  # of a stack: what its policies wrote when they were evaluated
CHECKPOINT_SECONDS = 30.0  # of work that is lost at most when a run is killed, while
CHECKPOINT_SHARE = 0.1  # of the time at most goes into writing checkpoints


def embedded_task(profile: Profile, source: RewardSource, world: World) -> Task:
    """Return the task of the embedded world: its prompts, a source, and gold beside it."""
    prompts = world.prompts(profile.policies.prompts, world.rng("policy prompts"))
    return Task(prompts, source, world.gold, population=profile.policies.count)


def policy_trainer(
    profile: Profile,
    architecture: str,
    reference: str | Path,
    task: Task,
    method: Method,
    *,
    policies: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    sampling: Sampling | None = None,
    **changes: Any,
) -> Trainer:
    """Return a trainer of policies of one architecture, with the profile's hyperparameters.

    Args:
        profile: says in which form they are trained and how.
        architecture: a name in the profile's `policies.training`.
        reference: the model that all start from, a folder or a name on the hub.
        task: what they are asked, and who judges.
        method: objective, coefficients, learning rates.
        policies: their global indices, by default as many as the profile says.
        seed: of the study.
        device: by default a GPU if there is one.
        sampling: of the responses, by default the profile's.
        changes: settings of PPO that are to differ from the profile's.
    """
    if architecture not in profile.policies.training:
        known = ", ".join(profile.policies.training)
        raise ValueError(f"architecture: profile {profile.name} has {known}, not {architecture}")
    training = profile.policies.training[architecture]
    index = list(range(profile.policies.count) if policies is None else policies)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = training.settings(method.objective)
    settings = type(settings).model_validate(settings.model_dump() | changes)
    stack = PolicyStack(
        reference,
        len(index),
        lora=None if training.lora is None else lora_config(training.lora),
        four_bit=training.lora is not None and training.lora.four_bit,
        dtype=torch.bfloat16 if training.lora is not None and training.lora.sixteen_bit else None,
        seeds=[seed * 1_000_003 + policy for policy in index],  # of one policy the same in every stack
        device=where,
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    model = None
    if training.lora is None:
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, device_map={"": where})
    return Trainer(
        stack,
        model,
        load_tokenizer(reference),
        task,
        method,
        settings,
        sampling or profile.policies.sampling,
        policies=index,
        seed=seed,
        critic=profile.policies.critic,
        warm_up=profile.policies.warm_up,
    )


def lora_config(settings: Lora) -> "LoraConfig":
    """Return peft's configuration of a profile's adapters."""
    from peft import LoraConfig  # here, for it takes seconds

    held = {"four_bit", "sixteen_bit"}
    return LoraConfig(task_type="CAUSAL_LM", bias="none", **settings.model_dump(exclude=held))


def write_tensorboard(log: pd.DataFrame, folder: str | Path) -> None:
    """Write a training log for TensorBoard, a run per policy."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError(
            "TensorBoard is not installed; install it with `pip install -e '.[tensorboard]'`"
        ) from None
    for policy, rows in log.groupby("policy"):
        with SummaryWriter(str(Path(folder) / f"policy-{policy}")) as writer:
            for (step, name), value in rows.drop(columns="policy").set_index("step").stack().items():
                writer.add_scalar(str(name), value, int(step))


def write_stack(
    folder: Path, scratch: Path, trainer: Trainer, evaluator: Evaluator, looks: Sequence[int] = ()
) -> None:
    """Train a stack, with no step taken, with checkpoints in `scratch`; evaluate every policy.

    The folder is filled with `policies.parquet`, `log.parquet`, `resources.json` and `policy`, the first
    policy as an ordinary checkpoint or adapter; with `looks.parquet`, the policies after these steps, if any,
    and `answers.parquet`, what the evaluator keeps of what they write.
    """
    index, started = trainer.index, time.perf_counter()
    start = [one.detach().to("cpu", copy=True) for one in trainer.stack.parameters().values()]

    def look(step: int) -> None:
        seen = with_gold(evaluator.policies(trainer.stack, index.tolist()))
        seen.assign(step=step).to_parquet(scratch / f"look-{step}.parquet")

    log, seconds = train_with_checkpoints(trainer, Checkpoints(scratch), look, looks)
    if looks:
        seen = [pd.read_parquet(scratch / f"look-{step}.parquet") for step in looks]
        pd.concat(seen, ignore_index=True).to_parquet(folder / "looks.parquet")
    if evaluator.answers is not None:
        evaluator.answers.clear()  # those of the looks
    table = evaluator.policies(trainer.stack, index.tolist())
    write_answers(folder, evaluator)
    table["step_length"] = step_lengths(start, trainer.stack)
    table = with_gold(table)
    trainer.stack.export(0, folder / "policy")
    log.to_parquet(folder / "log.parquet")
    table.to_parquet(folder / "policies.parquet")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of what the system counts memory in
    spent = {
        "training_seconds": seconds,
        "seconds": time.perf_counter() - started,
        "policies": len(index),
        "weights": sum(one.numel() for one in start) // len(index),
        "bytes": sum(path.stat().st_size for path in (folder / "policy").glob("*.safetensors")),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    (folder / "resources.json").write_text(json.dumps(spent, indent=1) + "\n")


def write_answers(folder: Path, evaluator: Evaluator) -> None:
    """Write what the evaluator has kept of policies' answers, if it keeps any."""
    if evaluator.answers:
        pd.concat(evaluator.answers, ignore_index=True).to_parquet(folder / ANSWERS)


@torch.no_grad()
def step_lengths(start: Sequence[torch.Tensor], stack: PolicyStack) -> np.ndarray:
    """Return how far each policy's trained weights are from where they started (policies,).

    It is the root mean square over weights, so that it compares with a learning rate.
    """
    moved = zip(stack.parameters().values(), start, strict=True)
    squares = [((now.cpu() - then).flatten(1).double() ** 2).sum(1) for now, then in moved]
    count = sum(one.numel() for one in start) / stack.size
    return np.asarray((torch.stack(squares).sum(0) / count).sqrt())


def with_gold(table: pd.DataFrame) -> pd.DataFrame:
    """Say that a gold reward is unknown, where it is."""
    return table.assign(**{name: np.nan for name in ("gold", "gold_error") if name not in table})


def train_with_checkpoints(
    trainer: Trainer,
    checkpoints: Checkpoints,
    look: Callable[[int], None] | None = None,
    looks: Sequence[int] = (),
) -> tuple[pd.DataFrame, float]:
    """Take the steps that are left; return the whole log, and the seconds of training so far.

    `look` is called after the steps `looks`, whose time does not count.
    """
    logs: list[pd.DataFrame] = []
    before = 0.0
    if (state := checkpoints.newest()) is not None:
        trainer.load_state(state)
        logs.append(_from_tensors(state))
        before = float(state["seconds"])
    report(trainer.done)
    started = saved = time.perf_counter()
    pause = CHECKPOINT_SECONDS
    while trainer.done < trainer.settings.iterations:
        logs.append(trainer.step())
        report(1)
        now = time.perf_counter()
        if look is not None and trainer.done in looks:
            look(trainer.done)
            started += time.perf_counter() - now
            now = time.perf_counter()
        if now - saved >= pause:
            logs = [pd.concat(logs, ignore_index=True)]
            spent = torch.tensor(before + now - started, dtype=torch.float64)
            state = trainer.state() | _as_tensors(logs[0]) | {"seconds": spent}
            checkpoints.save(trainer.done, state)
            saved = time.perf_counter()
            pause = max(CHECKPOINT_SECONDS, (saved - now) / CHECKPOINT_SHARE)
    log = pd.concat(logs, ignore_index=True)
    names = ["policy", "step", *sorted(set(log) - {"policy", "step"})]  # checkpoints keep no order
    return log[names], before + time.perf_counter() - started


def _as_tensors(log: pd.DataFrame) -> dict[str, torch.Tensor]:
    return {f"log.{name}": torch.tensor(log[name].to_numpy()) for name in log}


def _from_tensors(state: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    columns = {name: one.numpy() for name, one in state.items() if name.startswith("log.")}
    return pd.DataFrame({name.removeprefix("log."): one for name, one in columns.items()})
