"""A training step of the paper's network on all samples of modular addition: ours without autograd, against autograd.

pytest bench/bench_grokking.py
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lmnfast.grokking.config import Config, start
from lmnfast.grokking.gradients import Gradients


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("bar", ["ours", "eager, autograd"])
@torch.enable_grad()
def bench_grokking(benchmark, threads, sgemm_rate, bar):
    task, model = start(Config("modular-addition", device="cpu").settled())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.2, fused=True)
    gradients = Gradients(model, task.train_inputs, task.train_labels)

    def ours():
        gradients()
        optimiser.step()

    def autograd():
        optimiser.zero_grad()
        cross_entropy(model(task.train_inputs).double(), task.train_labels).backward()  # as ours
        optimiser.step()

    ours()
    found = [parameter.detach().clone() for parameter in model.parameters()]
    task, model = start(Config("modular-addition", device="cpu").settled())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.2, fused=True)
    autograd()
    for parameter, same in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter, same, rtol=1e-4, atol=1e-5)
    gradients = Gradients(model, task.train_inputs, task.train_labels)

    # One product forward and two backward, for the layers that cannot work token by token: the second and the third Linear.
    products = (
        3 * len(task.train_inputs) * sum(w.numel() for w in (model.hidden_2_pre.weight, model.output.weight))
    )
    benchmark.group = f"grokking, one step, 768 samples, threads={threads}"
    benchmark.extra_info.update(bar=bar, floor_s=products / sgemm_rate)
    benchmark.pedantic(ours if bar == "ours" else autograd, rounds=200, warmup_rounds=50)
