import os
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmnfast.checkpoints.steps import steps_of


@pytest.mark.parametrize(
    "names, steps",
    [
        ("step_2.pt step_10.pt", [2, 10]),
        ("step_5e3.pt step_1e4.pt step=2e+04.pt step_1.5e5.pt", [5000, 10_000, 20_000, 150_000]),
        ("m_500.pt m_1k.pt m_2K.pt m_1.5M.pt m_1B.pt", [500, 1000, 2000, 1_500_000, 10**9]),
        ("step-1,000.pt step-12,500.pt step-1,000,000.pt", [1000, 12_500, 1_000_000]),
        ("c_0.25.pt c_0.5.pt c_1.0.pt", [0.25, 0.5, 1]),
        ("0.25epochs.pt 1epochs.pt", [0.25, 1]),
        ("v1/epoch=0-step=100.ckpt v1/epoch=1-step=200.ckpt", [100, 200]),
        ("epoch=3-step=1200.ckpt", [1200]),
        ("epoch10iter200.pt epoch11iter220.pt", [200, 220]),
        ("epoch3_1200steps.pt epoch4_1600steps.pt", [1200, 1600]),
        ("epoch_1_100.pt epoch_1_200.pt epoch_2_300.pt", [100, 200, 300]),
        ("global_step1000/model.pt global_step20000/model.pt", [1000, 20_000]),
        ("iter_0001000/a_00.pt iter_0002000/a_00.pt", [1000, 2000]),
        ("ckpt-10.index ckpt-20.index", [10, 20]),
        ("checkpoint-500/model.bin checkpoint-1000/model.bin", [500, 1000]),
        ("checkpoint-500/model.bin", [500]),
        ("net3-iter_00010-loss0.5.pt net3-iter_00020-loss0.4.pt", [10, 20]),
        ("lr1e-3_step100.pt lr1e-3_step200.pt", [100, 200]),
        ("bs32e10_step1k.pt bs32e10_step2k.pt", [1000, 2000]),
        ("v1.2.3_100.pt v1.2.3_200.pt", [100, 200]),
        ("2024-05-01_12-30_100.pt 2024-05-02_09-15_200.pt", [100, 200]),
        ("3f8a2b91_7.pt 9a8b7c6d_8.pt", [7, 8]),
        ("network-100kimg.pt network-2000kimg.pt", [100_000, 2_000_000]),
        ("e1-l5.pt e2-l5.pt", [1, 2]),
        ("1.pt 2.pt 10.pt", [1, 2, 10]),
        ("model.step1000 model.step2000", [1000, 2000]),
        ("run7/step_30.pt", [30]),
        ("checkpoint_3.pth.tar", [3]),
        ("step_10.0.pt step_20.0.pt", [10, 20]),
    ],
)
def test_steps_are_what_names_say(names, steps):
    assert steps_of(names.split()) == steps


@pytest.mark.parametrize(
    "names",
    ["run7/last.pt", "first.pt last.pt", "resnet50.pt", "resnet50_v2.pt", "weights.h5", "a-3f8a2b91.pt b-9a8b7c6d.pt"],
)  # fmt: skip
def test_names_without_a_step_have_none(names):
    assert steps_of(names.split()) is None


@pytest.mark.parametrize(
    "names, said",
    [
        ("step_1.pt last.pt", "'last.pt' has no number that could be its step, others have; leave it out"),
        ("s0/step_1.pt s0/step_2.pt s1/step_1.pt", "'s0/step_1.pt' and 's1/step_1.pt' are both of step 1; "),
        ("epoch=0-step=9-v1.ckpt epoch=0-step=9.ckpt", "'epoch=0-step=9-v1.ckpt' and 'epoch=0-step=9.ckpt' are both"),
        ("step_1000.pt step_1k.pt", "'step_1000.pt' and 'step_1k.pt' are both of step 1k"),
        ("step_1_000.pt step_2_000.pt", "cannot read '1_000' in 'step_1_000.pt'"),
        ("step_12.500.pt step_13.000.pt", "cannot read '12.500' in 'step_12.500.pt'"),
        ("step_1,5.pt step_2,5.pt", "cannot read '1,5' in 'step_1,5.pt'"),
        ("step_1e400.pt step_1e401.pt", "cannot read '1e400' in 'step_1e400.pt'"),
        ("step_12345678901234567890.pt step_1.pt", "cannot read '12345678901234567890' in "),
        ("step_5a.pt step_6b.pt", "cannot read '6b' in 'step_6b.pt'"),
        ("bs32e10.pt bs32e20.pt", "cannot tell the step from the numbers in 'bs32e10.pt' and 'bs32e20.pt'; "),
        ("a_0.52_10.pt a_0.40_20.pt", "cannot tell the step"),
        ("epoch_5_seed1.pt epoch_5_seed2.pt", "cannot tell the step"),
        ("500Mtok.pt 1Btok.pt 2bags.pt", "cannot tell the step"),
    ],
)  # fmt: skip
def test_names_that_can_be_read_in_more_ways_than_one_are_refused(names, said):
    with pytest.raises(ValueError) as error:
        steps_of(names.split())
    assert str(error.value).startswith(f"steps: {said}")


def test_folders_that_all_share_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [os.path.abspath(f"run3/v{v}/step_{v}0.pt") for v in (1, 2)]
    assert steps_of(names) == [10, 20]
    assert steps_of([names[0], "run3/v1/step_5.pt"]) == [10, 5]


NOTATIONS = [str, "{:,}".format, "{:09d}".format, "{:.6e}".format, lambda step: f"{Decimal(step) / 1000}k"]


@given(
    st.lists(st.integers(0, 10**7), min_size=2, max_size=5, unique=True),
    st.sampled_from(NOTATIONS),
    st.sampled_from(
        ["step_{}.pt", "global_step{}/x.pt", "epoch=7-step={}.ckpt", "ckpt-{}.index", "net_{}_0.5.bin"]
    ),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_notation_gives_the_number_or_an_error(steps, notation, pattern):
    """Never the digits of a part of it."""
    said, read = "", None
    try:
        read = steps_of([pattern.format(notation(step)) for step in steps])
    except ValueError as error:
        said = str(error)
    assert said.startswith("steps: ") if read is None else [Fraction(step) for step in read] == steps
