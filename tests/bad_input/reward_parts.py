"""What rows about rewards are made of: tiny reward models and tokenizers, sources, reward functions."""

import json
import shutil
from pathlib import Path

import vaalign_lib.rewards.ensemble
import vaalign_lib.training.trl  # noqa: F401 - imports take longer than a refusal may


def rewards(folder: Path):
    """Yield what makes tiny reward models in `folder`, and sources of rewards: see `_Rewards`."""
    yield _Rewards(folder)


class _Rewards:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pairs = {"prompt": ["ask?"] * 6, "chosen": [*"abcdef"], "rejected": [*"ghijkl"]}

    def saved(self, kind="llama", drop=(), tokenizer=None, **config):
        """Save a model, without the files of some names, with another tokenizer or configuration."""
        from transformers import AutoTokenizer

        from tests.rewards.conftest import save_tiny

        folder = save_tiny(self.folder / "model", kind)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if tokenizer is not None:
            one = AutoTokenizer.from_pretrained(folder)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            for name, value in tokenizer.items():
                setattr(one, name, value)
            one.save_pretrained(folder)
        for name in drop:
            (folder / name).unlink()
        return folder

    def pickled(self):
        """Save a model as older ones are: with `pytorch_model.bin` alone."""
        folder = self.saved()
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        return folder

    def cut(self, name):
        """Save a model and cut one of its files."""
        path = self.saved() / name
        path.write_bytes(path.read_bytes()[:40])
        return path.parent

    def adapters(self):
        """Save a LoRA adapter over a causal base, as peft does."""
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.saved())
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
        peft.get_peft_model(base, lora).save_pretrained(self.folder / "adapters")
        return self.folder / "adapters"

    def causal(self):
        """Save a causal language model, which has no head that scores."""
        from transformers import AutoModelForCausalLM

        folder = self.saved()
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(self.folder / "causal")
        for path in folder.glob("*token*"):
            shutil.copy(path, self.folder / "causal")
        return self.folder / "causal"

    def classifier(self, folder=None, max_length=64):
        from vaalign_lib.rewards.ensemble import SequenceClassifierReward

        return SequenceClassifierReward.load(folder or self.saved(), max_length)

    def train(self, backbone=None, **pairs):
        import pandas as pd

        from vaalign_lib.profiles import load_profile
        from vaalign_lib.rewards.classifier import train_reward_model

        settings = load_profile("smoke").reward_model
        table = pd.DataFrame(self.pairs | pairs)
        backbone = str(backbone or self.saved())
        return train_reward_model(self.folder, table, settings=settings, backbone=backbone, seed=0)

    def heads(self, *, pairs=20, width=4, rejected=None, chosen=None, kind="paper", **options):
        import torch

        from vaalign_lib.profiles import load_profile
        from vaalign_lib.rewards.heads import train_heads

        features = torch.zeros(pairs, width)
        settings = load_profile("smoke").ensembles.trained
        return train_heads(
            features if chosen is None else chosen,
            features if rejected is None else rejected,
            kind=kind, settings=settings, seed=0, **options,
        )  # fmt: skip

    def ensemble(self, ensembles=1, **options):
        from vaalign_lib.rewards.ensemble import EnsembleReward

        one = self.classifier()
        heads, _ = self.heads(width=one.model.config.hidden_size, ensembles=ensembles)
        return EnsembleReward(one.model, one.tokenizer, heads, max_length=64, **options)

    def kept(self, file, content):
        """Save an ensemble, write something else into one of its files, and load it."""
        from vaalign_lib.rewards.ensemble import load_ensemble

        self.ensemble().save(self.folder / "ensemble")
        (self.folder / "ensemble" / file).write_text(content)
        return load_ensemble(self.folder / "ensemble")

    def source(self, judgement):
        return type("Source", (), {"judge": lambda self, prompts, responses, policy: judgement})()

    def asked(self, source, completions=("a", "b"), prompts=None, **options):
        """Call a source as a reward function of TRL."""
        from vaalign_lib.training.trl import reward_function

        function = reward_function(source, **options)
        return function(prompts=prompts or ["p"] * len(completions), completions=[*completions])

    def told(self, value):
        """Call a reward function of one's own, which returns a value, with two completions."""
        from vaalign_lib.training.trl import with_variances

        return with_variances(lambda **_: value)(prompts=["p"] * 2, completions=["a", "b"])

    def trainer(self, kind="rloo", columns=None, reward=None, steps=0, **options):
        from datasets import Dataset

        from tests import trl_problem

        data = Dataset.from_dict({"prompt": ["2"] * 32} | (columns or {}))
        usual, trl_problem.prompts = trl_problem.prompts, lambda: data
        try:
            one = trl_problem.make(kind, self.folder, reward=reward, **options)
        finally:
            trl_problem.prompts = usual
        if steps:
            one.train()
        return one
