"""Notebook 10's bench: policies on stored responses of the real model, in closed form, each with people of its
own (`theory.feature_bench`): what training would converge to, were policies free over these responses.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from vaalign_lib.data.pairs import prompts_of
from vaalign_lib.experiments.references import reference
from vaalign_lib.jobs import bar
from vaalign_lib.models import end_id, load_tokenizer, pad_id, response_texts
from vaalign_lib.policies.checks import checked_prompts
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import rollout
from vaalign_lib.profiles import Sampling, Study

PROMPTS, SAMPLES = 64, 48  # of the stored responses; samples of each prompt
_STORED = 2**31 + 10  # in place of a step, for their random numbers


def responses(study: Study) -> pd.DataFrame:
    """Return stored responses of the reference, `prompt` (a number), `sample`, `answer`; made now or before."""
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
