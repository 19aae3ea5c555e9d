"""What the tests of the Lightning callback share: a module and its fit."""

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from logged import X
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LABELS = torch.arange(64) % 3


class Module(L.LightningModule):
    def __init__(self, optimizers=1, plain=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        if plain:
            self.net = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3))
        self.count = optimizers
        self.automatic_optimization = optimizers == 1

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, labels = batch
        loss = F.cross_entropy(self(x), labels)
        self.log("loss", loss)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(x), labels))
                optimizer.step()
        return loss

    def configure_optimizers(self):
        made = [torch.optim.AdamW(self.parameters(), lr=1e-2) for _ in range(self.count)]
        return made[0] if self.count == 1 else made


def trainer_of(callbacks, logger=False, **settings):
    """A trainer on the CPU that prints nothing, and saves only what a callback saves."""
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(callbacks, steps=10, module=None, ckpt_path=None, **settings):
    L.seed_everything(0, verbose=False)
    module = module or Module()
    trainer = trainer_of(callbacks, max_steps=steps, log_every_n_steps=1, **settings)
    trainer.fit(module, DataLoader(TensorDataset(X, LABELS), 8, shuffle=True), ckpt_path=ckpt_path)
    return module
