"""The paper's network (arXiv 2310.05918, section 3)."""

import math
from collections import OrderedDict

import torch
from torch import nn

from .choices import ACTIVATIONS, DEPTH, EMBEDDING, HIDDEN, INITS

ACTIVATION_MODULES = dict(zip(ACTIVATIONS, (nn.SiLU, nn.ReLU), strict=True))


def make_model(
    vocabulary: int,
    generator: torch.Generator,
    *,
    init: str = "default",
    activation: str = "silu",
    width: int = HIDDEN,
    depth: int = DEPTH,
) -> nn.Sequential:
    """Embedding of two tokens, concatenated -> (Linear -> activation) for each hidden layer -> Linear, in float32.

    Its layers have the names of `layers_of` and "output", as in ``lmnfast.cut(model, "hidden_1", tokens)``.

    Args:
        vocabulary: number of tokens.
        generator: draws the weights, on the CPU.
        init: "default": PyTorch's initialisation. It is the paper's: with it the L2 norm of the weights grows as in the paper's
            Figure 2 from step 0 on. That the paper's LMN at step 0 is larger than ours (modular addition: 32, ours 22) is no
            matter of the weights; a number of about 8e-8 added to the denominator of r2 explains it on all three tasks.
            "lecun-first": the first linear layer's weights are scaled to standard deviation 1/8 = 1/sqrt(fan in). It is kept
            for runs that were begun with it.
        activation: one of ACTIVATION_MODULES.
        width: units of a hidden layer.
        depth: number of hidden layers, at least 1.

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
        layers: dict[str, nn.Module] = {
            "embedding": nn.Sequential(nn.Embedding(vocabulary, EMBEDDING), nn.Flatten())
        }
        for number in range(1, depth + 1):
            layers[f"hidden_{number}_pre"] = nn.Linear(2 * EMBEDDING if number == 1 else width, width)
            layers[f"hidden_{number}"] = ACTIVATION_MODULES[activation]()
        layers["output"] = nn.Linear(width, vocabulary)
        model = nn.Sequential(OrderedDict(layers))
        generator.set_state(torch.get_rng_state())
    if init == "lecun-first":
        with torch.no_grad():
            # PyTorch draws weights uniformly from +-1/sqrt(fan in). Their standard deviation is 1/sqrt(3 fan in).
            model.get_parameter("hidden_1_pre.weight").mul_(math.sqrt(3))
    return model
