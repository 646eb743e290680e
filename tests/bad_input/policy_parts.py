"""What rows about policies are made of: tiny models, tokenizers, adapters, sources of rewards."""

from pathlib import Path


def policies(folder: Path):
    """Yield what makes tiny policies, in memory and in `folder`: see `_Policies`."""
    yield _Policies(folder)


class _Policies:
    """The small problem, with one thing changed: `trainer(method=...)`, `saved(pad_token=None)`."""

    def __init__(self, folder: Path) -> None:
        from tests import small_problem

        self.folder, self.small = folder, small_problem
        self.source = small_problem.TableReward(lambda p, r: float(len(r)), lambda p, r: 1.0)

    def config(self, kind="gpt2", **changes):
        from tests.policies.conftest import config

        made = config(kind)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def tokenizer(self, words=9, **changes):
        from tokenizers.pre_tokenizers import WhitespaceSplit

        one = self.small.tokenizer(words)
        one.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
        for name, value in changes.items():
            setattr(one, name, value)
        return one

    def saved(self, kind="gpt2", head="AutoModelForCausalLM", drop=(), **changes):
        """Save a random model and a tokenizer, without the files of some names; return the folder."""
        import transformers

        config = self.config(kind, **changes) if isinstance(kind, str) else kind
        getattr(transformers, head).from_config(config).save_pretrained(self.folder / "model")
        self.small.tokenizer(9).save_pretrained(self.folder / "model")
        for name in drop:
            (self.folder / "model" / name).unlink()
        return self.folder / "model"

    def pickled(self):
        """Save a model as older ones are: with `pytorch_model.bin` alone."""
        import torch
        from safetensors.torch import load_file

        folder = self.saved()
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    def adapters(self):
        """Save a LoRA adapter over a base, as peft does."""
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(self.saved())
        peft.get_peft_model(base, self.lora()).save_pretrained(self.folder / "adapters")
        return self.folder / "adapters"

    def lora(self, **changes):
        import peft

        return peft.LoraConfig(**{"r": 2, "target_modules": ["c_attn"]} | changes)

    def stack(self, source=None, size=1, **options):
        from vaalign_lib.policies.stack import PolicyStack

        return PolicyStack(self.config() if source is None else source, size, **options)

    def trainer(
        self, *, stack=None, reference=None, tokenizer=None, prompts=("2", "3"), source=None,
        gold=None, task=None, method=None, steps=0, sampling=None, ppo=None, **options,
    ):  # fmt: skip
        """Return a trainer of two policies, after some steps."""
        from vaalign_lib.policies.stack import PolicyStack
        from vaalign_lib.profiles import PPO, Sampling
        from vaalign_lib.training.objectives import Method, Task
        from vaalign_lib.training.ppo import Trainer

        small = self.small
        one = Trainer(
            PolicyStack(small.policy(9), 2) if stack is None else stack,
            small.policy(9) if reference is None else reference,
            small.tokenizer(9) if tokenizer is None else tokenizer,
            Task(prompts, source or self.source, gold) if task is None else task,
            method or Method(standardized=False),
            PPO(**{"iterations": 4, "batch_size": 8, "mini_batch_size": 8} | (ppo or {})),
            Sampling(**{"min_new_tokens": 0, "max_new_tokens": 6} | (sampling or {})),
            **{"warm_up": 16} | options,
        )
        if steps:
            one.train(steps)
        return one

    def evaluator(self, prompts=("2", "3"), samples=2, tokenizer=None, source=None, **sampling):
        from vaalign_lib.policies.reference import ReferencePolicy
        from vaalign_lib.profiles import Sampling
        from vaalign_lib.training.evaluation import Evaluator
        from vaalign_lib.training.objectives import Task

        how = Sampling(**{"min_new_tokens": 0, "max_new_tokens": 6} | sampling)
        return Evaluator(ReferencePolicy(self.small.policy(9)), tokenizer or self.small.tokenizer(9),
                         Task(prompts, source or self.source), how, samples, 0)  # fmt: skip

    def answering(self, judgement, truth=None, late=0):
        """Return a source that judges by a function of the number of responses, after some calls."""
        source = type("Answering", (type(self.source),), {})(self.source.middle, self.source.variance)
        usual, calls = source.judge, []

        def judge(prompts, responses, policy):
            calls.append(1)
            if len(calls) <= late:
                return usual(prompts, responses, policy)
            return judgement(len(responses))

        if judgement is not None:
            source.judge = judge
        if truth is not None:
            source.true_reward = lambda judgement, prompts, responses: truth(len(responses))
        return source


# --- folders of models that a profile names ------------------------------------------------------------


def policy_folders(folder: Path) -> None:
    """Write models, each into `folder`/<what is wrong with it>."""
    import shutil

    import transformers

    transformers.utils.logging.disable_progress_bar()
    (folder / "made").mkdir()
    made = _Policies(folder / "made")
    whole = made.saved(n_positions=64)
    bert = transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=16)  # fmt: skip
    made.tokenizer().save_pretrained(whole)
    for name in ("good", "whole", "no_tokenizer", "no_weights", "no_end"):
        shutil.copytree(whole, folder / name)
    for file in (folder / "no_tokenizer").glob("token*"):
        file.unlink()
    (folder / "no_weights/model.safetensors").unlink()
    made.tokenizer(eos_token=None).save_pretrained(folder / "no_end")
    made.tokenizer(30, eos_token="29").save_pretrained(folder / "whole")
    shutil.move(made.adapters(), folder / "adapters")
    shutil.move(made.saved(bert, "AutoModel"), folder / "bert")
