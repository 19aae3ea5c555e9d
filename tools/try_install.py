"""Tries an installed lmnfast: prints what it is, and measures a network whose number is known otherwise.

python tools/try_install.py             any install
python tools/try_install.py compiled    one with the compiled core
python tools/try_install.py reference   one without
"""

import sys

import torch
from torch import nn

import lmnfast
from lmnfast import _native, cli, reference
from lmnfast.quadrature import path_nodes


def main() -> None:
    cli.main(["info"])
    found = "compiled" if _native.HAS_CORE else "reference"
    assert sys.argv[1:] in ([], [found]), f"expected {sys.argv[1]}, got {found}: {_native.info()['core']}"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 5)).requires_grad_(False)
    x = torch.randn(20, 8)
    L = reference.path_connectivity(model.double(), x.double(), *path_nodes("uniform", 21))
    expected = reference.linear_mapping_number(L).item()
    got = lmnfast.lmn(model.float(), x).item()
    assert abs(got / expected - 1) < 1e-5, f"LMN: expected {expected}, got {got}"
    assert abs(lmnfast.linear_mapping_number(torch.eye(5)).item() - 5) < 1e-9
    print(f"{found}: LMN {got:.6f}, as it should be")


if __name__ == "__main__":
    main()
