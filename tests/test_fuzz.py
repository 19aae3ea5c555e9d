"""Five hundred random networks, on every instruction set and route, against the truth of tests/fuzz_truth.py; the list of
tests/fuzz_ops.py."""

import fuzz_ops
import pytest
import torch
from fuzz_cases import Case, draw
from fuzz_verdicts import Expected, Verdict, check, judge, measured
from support import LEVELS

from lmnfast import _native, ops

CASES, PARTS = 500, 10


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # forward mode, in the rival
@pytest.mark.parametrize("part", range(PARTS))
def test_matrices_of_random_networks_are_as_right_as_pytorch(part, threads):
    threads(1)
    levels = [level for level in LEVELS if level in _native._C.isas()]
    seeds = range(part * CASES // PARTS, (part + 1) * CASES // PARTS)
    failures = [verdict for seed in seeds for verdict in check(draw(seed), levels) if verdict.failure]
    assert not failures, "\n".join(
        f"python tests/fuzz.py --only {v.seed} --show  # {v.level} {v.dtype} {v.route} {v.method}: {v.failure} {v.text}"
        for v in failures
    )


def test_the_fuzzer_of_ops_calls_every_op():
    assert set(fuzz_ops.MAKERS) == set(ops.__all__)


@pytest.mark.parametrize("offset, failure", [(0.0, ""), (2e-5, "error")])
def test_an_entry_that_is_off_by_a_hundred_roundings_fails(offset, failure):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int):
        return torch.randn(shape, generator=generator).double().numpy()

    activations = [("identity", 0.0, 0.0), ("silu", 0.0, 0.0), ("identity", 0.0, 0.0)]
    case = Case(
        0, "float32", "path", weights=[normal(20, 6), normal(4, 20)], biases=[None, None], x=normal(9, 6)
    )
    case.activations = activations
    with torch.no_grad():
        expected = Expected(case)
        L, fused = measured(case, False)
        assert fused
        L[0, 1] = L[1, 0] = L[0, 1] - offset
        verdict = Verdict(case.seed, case.dtype, "fused", case.method, "")
        judge(L, expected, expected.bounds(True), verdict)
    assert verdict.failure == failure
