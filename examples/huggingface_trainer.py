"""LMN of each block of a small GPT in a Hugging Face Trainer, shown by TensorBoard:
pip install lmnfast[transformers,tensorboard]. The model is made here and learns to repeat random tokens.

python examples/huggingface_trainer.py --steps 200
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from lmnfast.integrations.transformers import LMNCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--every", type=int, default=25)
parser.add_argument("--run", default="runs/huggingface")
arguments = parser.parse_args()

set_seed(0)
half = torch.randint(1, 32, (512, 6))
tokens = torch.cat([half, half], 1)
labels = tokens.clone()
labels[:, :6] = -100  # the first occurrence of the tokens is random, so it is left out of the loss
config = GPT2Config(
    vocab_size=32,
    n_positions=12,
    n_embd=32,
    n_layer=3,
    n_head=4,
    bos_token_id=0,
    eos_token_id=0,
    use_cache=False,
)
trainer = Trainer(
    GPT2LMHeadModel(config),
    TrainingArguments(
        arguments.run,
        max_steps=arguments.steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        logging_steps=arguments.every,
        save_strategy="no",
        report_to="tensorboard",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)],
)
callback = LMNCallback(
    {"input_ids": tokens[:24]},
    "transformer.h.*",
    every=arguments.every,
    output=lambda outputs: outputs.logits[
        :, -1
    ],  # the logits after the last token; output="logits" would take those of all tokens
    rule="lobatto",
    points=9,
).attach(trainer)
trainer.train()

print("step   loss    LMN after block")
losses = {entry["step"]: str(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry}
steps = sorted({row["step"] for row in callback.history})
for step in steps:
    values = "  ".join(f"{row['lmn']:6.2f}" for row in callback.history if row["step"] == step)
    print(f"{step:4d}   {losses.get(step, ''):<5.5}  {values}")
print(f"tensorboard --logdir {arguments.run}")
