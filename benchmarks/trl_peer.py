"""The peer of `policy_stack.py`: steps of trl 0.11.4's PPOTrainer on one policy.

python trl_peer.py MODEL BATCH EPOCHS STEPS
"""

import json
import sys
import time
import warnings

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, batch, epochs, steps = sys.argv[1], *map(int, sys.argv[2:])
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>", eos_token="<eos>"
)
policies = [
    AutoModelForCausalLMWithValueHead.from_pretrained(AutoModelForCausalLM.from_pretrained(folder))
    for _ in range(2)
]
config = PPOConfig(learning_rate=1e-4, batch_size=batch, mini_batch_size=batch, ppo_epochs=epochs,
                   adap_kl_ctrl=False)  # fmt: skip
trainer = PPOTrainer(config, *policies, tokenizer)
sampling = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_new_tokens": 32,
            "max_new_tokens": 32, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
queries = [torch.randint(3, 100, (11,)) for _ in range(batch)]
total = 0.0
for step in range(steps + 1):
    started = time.process_time()
    answers = trainer.generate(queries, return_prompt=False, batch_size=batch, **sampling)
    trainer.step(queries, answers, [torch.randn(()) for _ in answers])
    total += (time.process_time() - started) * (step > 0)
print(json.dumps({"seconds": total / steps}))
