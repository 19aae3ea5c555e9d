"""The tiles of all pairs of samples: every pair is in one, and all are of one size."""

import pytest
import torch

from lmnfast._plane import MOST_SAMPLES, Plane


@pytest.mark.parametrize("samples", [2, 3, 8, 9, 10, 101, 1300, 2600])
def test_every_pair_of_samples_of_two_blocks_is_in_one_tile(samples):
    plane = Plane(samples)
    q = plane.order
    times = torch.zeros(samples, samples, dtype=torch.int32)
    block = torch.empty(samples, dtype=torch.int64)
    for tile in range(plane.tiles):
        members = plane.members(tile)
        assert (members.diff() > 0).all()
        times[members[:, None], members] += 1
        if plane.is_last_of_blocks(tile):
            for place, run in enumerate(plane.blocks(tile)):
                block[run.start : run.stop] = q * tile + place
    within = block[:, None] == block
    assert (times[~within] == 1).all() and (times[within] == q + 1).all()


@pytest.mark.parametrize(
    "samples, order", [(100, 3), (768, 3), (1300, 3), (4096, 7), (20_000, 31), (200_000, 47)]
)
def test_tiles_are_large_and_of_one_size(samples, order):
    plane = Plane(samples)
    assert plane.order == order and plane.tiles == order * (order + 1)
    sizes = [len(plane.members(tile)) for tile in plane.each()]
    assert max(sizes) - min(sizes) <= order
    assert min(sizes) >= 512 or order == 3
    assert max(sizes) <= 1.1 * MOST_SAMPLES
    # Pairs within a block are measured again on each of its lines: a share 1 / q of all.
    assert sum(map(plane.pairs, plane.each())) < samples * (samples - 1) / 2 * (1 + 1.01 / order)


@pytest.mark.parametrize("samples", [5, 900, 20_000])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 100])
def test_shards_have_every_tile_once_and_the_same_work(samples, count):
    plane = Plane(samples)
    shards = [plane.of_shard(number, count) for number in range(count)]
    assert [tile for shard in shards for tile in shard] == list(plane.each())
    work = [sum(map(plane.pairs, shard)) for shard in shards]
    if samples > 500:
        most = -(-plane.tiles // count) * max(map(plane.pairs, plane.each()))
        assert max(work) <= most  # no shard has a tile more than it must
    if samples == 20_000 and count <= 4:
        assert max(work) < 1.01 * sum(work) / count
