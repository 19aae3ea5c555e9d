"""The paper's network (arXiv 2310.05918, section 3)."""

import math
from collections import OrderedDict

import torch
from torch import nn

INITS = ("default", "lecun-first")
ACTIVATION_MODULES = {"silu": nn.SiLU, "relu": nn.ReLU}  # the paper uses the first
LAYERS = ("embedding", "hidden_1_pre", "hidden_1", "hidden_2_pre", "hidden_2")  # the layers to cut at
EMBEDDING, HIDDEN = 32, 100  # widths in the paper


def make_model(
    vocabulary: int, generator: torch.Generator, *, init: str = "default", activation: str = "silu"
) -> nn.Sequential:
    """Embedding of two tokens, concatenated -> Linear -> activation -> Linear -> activation -> Linear, in float32.

    Its layers have the names in LAYERS and "output", as in ``lmnfast.cut(model, "hidden_1", tokens)``.

    Args:
        vocabulary: number of tokens.
        generator: draws the weights, on the CPU.
        init: "default": PyTorch's initialisation. "lecun-first": the first linear layer's weights are scaled to standard
            deviation 1/8 = 1/sqrt(fan in). The LMN at step 0 is then 32, as in the paper, in place of 22 to 24. The paper does
            not state its initialisation.
        activation: one of ACTIVATION_MODULES.

    Returns:
        A model that maps tokens (batch, 2) int64 to logits (batch, vocabulary).

    Raises:
        ValueError: unknown init or activation.
    """
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
    if activation not in ACTIVATION_MODULES:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATION_MODULES)}, got {activation!r}")
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())  # torch's layers only use the global generator
        model = nn.Sequential(
            OrderedDict(
                embedding=nn.Sequential(nn.Embedding(vocabulary, EMBEDDING), nn.Flatten()),
                hidden_1_pre=nn.Linear(2 * EMBEDDING, HIDDEN),
                hidden_1=ACTIVATION_MODULES[activation](),
                hidden_2_pre=nn.Linear(HIDDEN, HIDDEN),
                hidden_2=ACTIVATION_MODULES[activation](),
                output=nn.Linear(HIDDEN, vocabulary),
            )
        )
        generator.set_state(torch.get_rng_state())
    if init == "lecun-first":
        with torch.no_grad():
            # PyTorch draws weights uniformly from +-1/sqrt(fan in). Their standard deviation is 1/sqrt(3 fan in).
            model.get_parameter("hidden_1_pre.weight").mul_(math.sqrt(3))
    return model
