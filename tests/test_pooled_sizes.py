"""r2 pooled over the outputs of a chain, and a stabiliser: outputs of different sizes, of which some do not vary."""

from dataclasses import replace

import pytest
import torch
from chains import cast, measured, random_chain, samples
from support import UNIFORM

from lmnfast import ops, reference
from lmnfast._chain import Chain


def pooled(chain, x, device, dtype, stabiliser=0.0) -> torch.Tensor:
    """The kernel's matrix, brought to the CPU."""
    chain, x = cast(chain, dtype, device), x.to(device, dtype)
    return ops.path_connectivity(chain, x, *UNIFORM, stabiliser=stabiliser, pooled=True).cpu()


def test_pooled_r2_is_that_of_the_output_that_varies_most(device, dtype):
    chain, x = random_chain([6, 20, 5], ["identity", "silu", "identity"]), samples(19, 6)
    chain.weights[1][4] *= 1e6
    alone = Chain(
        (chain.weights[0], chain.weights[1][4:]), (chain.biases[0], chain.biases[1][4:]), chain.activations
    )
    expected = measured(alone, x, device, dtype)
    assert expected.min() < 0.9
    assert (pooled(chain, x, device, dtype) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("stabiliser", [0.0, 1e-40])
def test_where_the_large_output_does_not_vary_the_small_one_counts(stabiliser, device, dtype):
    """The square of the small output's variation, in the large one's unit, is below the smallest float32."""
    chain, x = random_chain([6, 20, 2], ["identity", "silu", "identity"]), samples(13, 6).float().double()
    chain.weights[0][:10, 3:] = 0  # the large output depends on three of the inputs
    chain.weights[1][0, 10:] = 0
    chain.weights[1][1] *= 1e-15
    chain.biases[1][1] = 0
    x[5:9, :3] = x[5, :3]
    expected = reference.path_connectivity(chain, x, *UNIFORM, stabiliser=stabiliser, pooled=True)
    assert expected[5:9, 5:9].min() < 0.97
    error = (pooled(chain, x, device, dtype, stabiliser) - expected).abs()
    assert error.max() < (1e-4 if dtype == torch.float32 else 1e-10)
    assert error[5:9, 5:9].max() < 1e-5


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_a_stabiliser_is_in_the_square_of_the_outputs_unit(factor, device, dtype):
    chain, x = random_chain([6, 20, 4], ["identity", "silu", "identity"]), samples(13, 6)
    larger = Chain(
        (chain.weights[0], chain.weights[1] * factor),
        (chain.biases[0], chain.biases[1] * factor),
        chain.activations,
    )
    expected = pooled(chain, x, device, dtype, 0.3)
    assert torch.equal(pooled(larger, x, device, dtype, 0.3 * factor**2), expected)
    assert (pooled(larger, x, device, dtype, 0.3) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("n", [1, 2, 8, 9])
@pytest.mark.parametrize("depth", [1, 3])
def test_any_number_of_samples(n, depth, device, dtype):
    chain = random_chain([6, *[20] * depth, 4], ["identity", *["silu"] * depth, "identity"], scale=1.0)
    x = samples(n, 6)
    expected = reference.path_connectivity(chain, x, *UNIFORM, stabiliser=0.1, pooled=True)
    error = (pooled(chain, x, device, dtype, 0.1) - expected).abs()
    assert error.max() < (2e-5 if dtype == torch.float32 else 1e-10)


def test_lists_of_pairs_are_for_the_cpu(emulated):
    chain, x = random_chain([6, 20, 4], ["identity", "silu", "identity"]), samples(9, 6)
    pair = torch.tensor([0])
    arguments = [x, list(chain.weights), list(chain.biases), [0, 4, 0], [0.0] * 6, [], [], *UNIFORM]
    with pytest.raises(ValueError, match="first, second: expected both or neither"):
        torch.ops.lmnfast.path_connectivity(*arguments, first=pair, second=pair + 1)


def test_samples_that_only_agree_are_not_one_sample_with_a_stabiliser(device, dtype):
    """The first pre-activations of all samples are 0, so the outputs are constant: bent, but between equal samples."""
    chain = random_chain([4, 6, 3], ["identity", "silu", "identity"])
    chain = replace(chain, weights=(torch.zeros_like(chain.weights[0]), chain.weights[1]))
    x = samples(9, 4)
    x[6] = x[2]
    expected = torch.eye(9, dtype=torch.float64)
    expected[2, 6] = expected[6, 2] = 1
    for pooled_too in (False, True):
        L = ops.path_connectivity(
            cast(chain, dtype, device), x.to(device, dtype), *UNIFORM, stabiliser=1e-2, pooled=pooled_too
        )
        assert torch.equal(L.cpu().double(), expected)
