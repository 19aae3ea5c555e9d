"""The emulator's grids whose blocks wait for one another, by small kernels compiled against it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import EMULATED, LEVELS

SOURCES = Path(__file__).parent / "emulator"
pytestmark = pytest.mark.skipif(EMULATED not in LEVELS, reason="built without LMNFAST_CUDA=emulated")

PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include <string>
#include "cuda_runtime.h"

static long posted[8];
static int received;
static void post(int at) { __atomic_store_n(&posted[at], 1, __ATOMIC_RELAXED); }
static void await(int at) { while (!__atomic_load_n(&posted[at], __ATOMIC_RELAXED)) emulator::give_way(); }

int main(int, char** argv) {
  const std::string what = argv[1];
  const int blocks = 4;
  if (what == "ring") {  // block after block, the last one first, twice round
    emulator::run_cooperative_grid(blocks, 64, 0, [&] {
      const int block = int(blockIdx.x);
      for (int round = 0; round < 2; ++round) {
        const bool last = block == blocks - 1;
        if (threadIdx.x == 33 && !(last && round == 0)) await((block + 1) % blocks + (last ? 0 : 4 * round));
        __syncthreads();
        if (threadIdx.x == 0) post(block + 4 * round), ++received;
        __syncthreads();
      }
    });
    std::printf("%d\n", received);
  } else if (what == "own shared memory") {
    emulator::run_cooperative_grid(blocks, 32, 4, [&] {
      int* own = reinterpret_cast<int*>(emulator::dynamic_shared());
      if (threadIdx.x == 0) *own = int(blockIdx.x), post(int(blockIdx.x));
      if (threadIdx.x == 0) for (int other = 0; other < blocks; ++other) await(other);
      if (threadIdx.x == 0 && *own == int(blockIdx.x)) ++received;
    });
    std::printf("%d\n", received);
  } else if (what == "barrier") {  // 32 threads wait for 32 that do not
    emulator::run_cooperative_grid(2, 64, 0, [&] {
      for (int n = 0; n < 5; ++n) {
        if (threadIdx.x >= 32) {
          __atomic_fetch_add(&received, 1, __ATOMIC_RELAXED);
          emulator::named_barrier(3, 64, false);
          emulator::named_barrier(4, 64, true);
        } else {
          emulator::named_barrier(3, 64, true);
          emulator::named_barrier(4, 64, false);
        }
      }
    });
    std::printf("%d\n", received);
  } else if (what == "never posted") {
    emulator::run_cooperative_grid(blocks, 32, 0, [&] { if (blockIdx.x == 2) await(0); });
  } else if (what == "never met") {
    emulator::run_cooperative_grid(1, 64, 0, [&] { if (threadIdx.x < 32) emulator::named_barrier(1, 64, true); });
  } else if (what == "left over") {
    emulator::run_cooperative_grid(1, 64, 0, [&] { if (threadIdx.x < 32) emulator::named_barrier(1, 64, false); });
  } else if (what == "not cooperative") {
    emulator::run_grid(2, 1, 32, 0, [&] { blockIdx.x == 1 ? await(0) : post(0); });
  } else if (what == "two dimensions") {
    static int seen[3][5];
    emulator::run_grid(5, 3, 1, 0, [&] { seen[blockIdx.y][blockIdx.x] += gridDim.x == 5 && gridDim.y == 3; });
    for (auto& row : seen) {
      for (int count : row) received += count == 1;
    }
    std::printf("%d\n", received);
  } else {  // one more than there are multiprocessors
    emulator::run_cooperative_grid(5, 32, 0, [&] { ++received; });
    std::printf("%d %s\n", received, cudaGetErrorString(cudaGetLastError()));
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "program.cpp").write_text(PROGRAM)
    sources = [folder / "program.cpp", SOURCES / "emulator.cpp"]
    options = ["-std=c++17", "-O1", "-fopenmp", "-Wno-psabi", "-Wno-unknown-pragmas", f"-I{SOURCES}"]
    subprocess.run([compiler, *options, *sources, "-o", folder / "program"], check=True)
    return folder / "program"


def run(program: Path, what: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LMNFAST_EMULATED_MULTIPROCESSORS": "4"}
    # The time is for a program that hangs: it takes milliseconds.
    return subprocess.run(
        [program, what], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("what, said", [("ring", "8"), ("own shared memory", "4"), ("barrier", "320")])
def test_emulated_blocks_that_wait_for_one_another_end(program, what, said):
    done = run(program, what)
    assert (done.returncode, done.stdout.strip()) == (0, said)


@pytest.mark.parametrize(
    "what, message",
    [
        ("never posted", "the blocks that are left wait for one another for ever"),
        ("never met", "its threads wait for one another for ever"),
        ("left over", "32 threads have arrived at barrier 1, and nobody has met them there"),
        ("not cooperative", "it waits for another block, in a grid that is not cooperative"),
    ],
)
def test_an_emulated_wait_without_end_ends_with_a_message(program, what, message):
    done = run(program, what)
    assert done.returncode and message in done.stderr


def test_an_emulated_grid_of_two_dimensions_has_every_block_once(program):
    assert run(program, "two dimensions").stdout.strip() == "15"


def test_an_emulated_cooperative_grid_larger_than_the_card_is_refused(program):
    assert run(program, "too large").stdout.strip() == "0 too many blocks in cooperative launch"
