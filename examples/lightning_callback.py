"""LMN in a Lightning training, in its CSV log beside the loss: pip install lmnfast[lightning].

python examples/lightning_callback.py --steps 400
"""

import argparse

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lmnfast.integrations.lightning import LMNCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--every", type=int, default=50)
parser.add_argument("--run", default="runs/lightning")
arguments = parser.parse_args()


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(10, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, labels = batch
        loss = F.cross_entropy(self(x), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


L.seed_everything(0, verbose=False)
inputs = torch.randn(512, 10)
labels = (inputs[:, :2].prod(1) > 0).long()  # exclusive or of two signs: no linear map can learn it
callback = LMNCallback(inputs[:200], ["network.0", "network.1"], every=arguments.every)
logger = CSVLogger(arguments.run)
trainer = L.Trainer(
    max_steps=arguments.steps,
    accelerator="cpu",
    callbacks=[callback],
    logger=logger,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True))

for row in callback.history:
    print(f"step {row['step']:5d}   {row['layer']}   LMN {row['lmn']:.2f}")
print(f"logged to {logger.log_dir}/metrics.csv")
