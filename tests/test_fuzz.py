"""A thousand random networks, on every instruction set and route, against the truth of tests/fuzz.py."""

import pytest
import torch
from conftest import LEVELS
from fuzz import check, draw

from lmnfast import _native

CASES, PARTS = 1000, 20


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


def test_a_wrong_entry_is_found():
    """An entry that is off by what a residual of one TF32 product costs, in the first case in which PyTorch loses little."""
    from fuzz import Expected, Verdict, _judge, measured

    case = next(c for c in map(draw, range(100)) if c.dtype == "float32" and len(c.x) > 5 and not c.traits)
    with torch.no_grad():
        L, _ = measured(case, True)
        expected = Expected(case)
        bounds = expected.bounds(False)
        for offset, failure in ((0.0, ""), (1e-3, "error")):
            wrong = L.copy()
            wrong[0, 1] = wrong[1, 0] = L[0, 1] + (offset if L[0, 1] < 0.5 else -offset)
            verdict = Verdict(case.seed, case.dtype, "generic", case.method, "")
            _judge(wrong, expected, bounds, verdict)
            assert verdict.failure == failure
