#!/usr/bin/env bash
# All tests and benchmarks that need a machine with an NVIDIA card. No network is needed, but a Python with torch for CUDA,
# pybind11, cmake, ninja, pytest and pytest-benchmark, and nvcc. The script builds lmnfast and installs it into that Python.
#
#   bench/gpu.sh build test             at most 7 minutes; in 8 processes if pytest-xdist is installed
#   bench/gpu.sh build sanitize         at most 7 minutes
#   bench/gpu.sh build calls bench      at most 10 minutes: the cost of public calls for the host, then the kernels
#   bench/gpu.sh build seeds            at most 6 minutes: 256 seeds that train together, timed, and three held to their runs alone
#   bench/gpu.sh bench PART...          only these bench/bench_PART.py. Without PART: path_r2 path_connectivity spectral_entropy
#                                       connectivity symmetric_eigenvalues probe, which fit the time. The others are
#                                       check_outputs hermite_connectivity jacobian jacobian_distance
#                                       path_connectivity_backward
#   bench/gpu.sh profile CALL...        Nsight Compute on the kernels of calls in bench/calls.py. Without CALL: connectivity, and
#                                       connectivity by hermite
#
# "build" is needed once on a machine. The tables are printed last. Each row has the command that makes only this row.
# RESULTS=DIRECTORY is the place of the benchmarks' <card>.json and <card>.md (bench/results). If a stage fails or runs out of
# time, the next stages still run, and the exit code is 1. ONLY=cpu tries the script without a card.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-bench/results}
only=${ONLY:-cuda}
python=${PYTHON:-python3}
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT
failed=()
tables=()
command_line="bench/gpu.sh $*"

# stage NAME SECONDS COMMAND...: after SECONDS it sends SIGINT first, so that pytest still writes its results so far
stage() {
  local name=$1 seconds=$2
  shift 2
  echo "=== $name (at most $seconds s)"
  local start=$SECONDS
  timeout --signal=INT --kill-after=15 "$seconds" "$@"
  local code=$?
  [ $code -eq 124 ] || [ $code -eq 137 ] && echo "$name: out of time" >&2
  [ $code -eq 0 ] || failed+=("$name")
  echo "=== $name: exit code $code after $((SECONDS - start)) s"
}

build() {
  local cuda=on
  [ "$only" = cuda ] || cuda=off
  stage build 140 env LMNFAST_CUDA=$cuda "$python" -m pip install --no-build-isolation --no-deps .
  # From another folder, because in the checkout Python would import the checkout's own folder.
  (cd / && "$python" -m lmnfast.cli info)
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv 2>/dev/null || true
}

tests() {
  local parallel=()
  "$python" -c "import xdist" 2>/dev/null && parallel=(-n 8)
  # -P: without it the checkout's lmnfast, which has no compiled core, comes before the installed one. pytest-benchmark warns if
  # pytest-xdist is active, and the tests' settings make this an error. One thread: eight processes with one thread per core each
  # would wait for one another.
  stage "GPU tests" 260 env OMP_NUM_THREADS=1 "$python" -P -m pytest -p no:cacheprovider -p no:benchmark "${parallel[@]}" \
    -k "$only" --maxfail=20 tests
}

sanitize() {
  stage "small calls" 40 "$python" -P tests/smoke_gpu.py "$only"
  if ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: no compute-sanitizer on the path" >&2
    failed+=(sanitize)
    return
  fi
  for tool in memcheck racecheck; do
    # Without torch's caching every tensor is an allocation of its own, whose end memcheck knows. The limit is an estimate: on an
    # H200 with nothing beside it racecheck took 52 s when tests/smoke_gpu.py called five ops; it calls more now.
    stage $tool 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$python" -P tests/smoke_gpu.py "$only"
  done
}

bench() {
  local parts=("$@") written=() seconds
  if ! "$python" -c "import pytest_benchmark"; then
    echo "bench: expected the Python package pytest-benchmark in $python" >&2
    failed+=(bench)
    return
  fi
  [ ${#parts[@]} -gt 0 ] || parts=(path_r2 path_connectivity spectral_entropy connectivity symmetric_eigenvalues probe)
  for part in "${parts[@]}"; do
    case $part in
      path_connectivity) seconds=200 ;;
      path_r2 | symmetric_eigenvalues) seconds=60 ;;
      *) seconds=25 ;;
    esac
    stage "bench $part" $seconds "$python" -P -m pytest -p no:cacheprovider "bench/bench_$part.py" -k "$only" \
      -W ignore::pytest_benchmark.logger.PytestBenchmarkWarning --benchmark-json="$log/$part.json"
    [ -s "$log/$part.json" ] && written+=("$log/$part.json")
  done
  [ ${#written[@]} -eq 0 ] && return
  stage report 20 "$python" bench/results.py "$results" "$command_line" "${written[@]}" > "$log/report"
  cat "$log/report"
  local table
  table=$(sed -n 's/^written: .*, \(.*\.md\)$/\1/p' "$log/report")
  [ -z "$table" ] || tables+=("$table")
}

calls() {
  stage calls 40 "$python" -P bench/calls.py --device "$only" > "$log/calls.md"
  tables+=("$log/calls.md")
}

seeds() {
  # On a CPU, where nothing is gained by it, a small version only tries the script.
  local size=(--seeds 256 --steps 1000)
  [ "$only" = cuda ] || size=(--seeds 3 --steps 20)
  stage seeds 220 "$python" -P bench/seeds.py --device "$only" "${size[@]}" > "$log/seeds.md"
  tables+=("$log/seeds.md")
}

profile() {
  if ! command -v ncu >/dev/null; then
    echo "profile: no ncu (Nsight Compute) on the path" >&2
    failed+=(profile)
    return
  fi
  local names=("$@")
  [ ${#names[@]} -gt 0 ] || names=(connectivity "connectivity, hermite")
  for name in "${names[@]}"; do
    # Only kernels in the namespace lmn:: are profiled, not torch's.
    stage "profile $name" 120 ncu --profile-from-start off --kernel-name-base demangled --kernel-name "regex:lmn::" \
      --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
      "$python" -P bench/calls.py --once "$name"
  done
}

[ $# -gt 0 ] || { sed -n '2,17s/^# \?//p' "$0"; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    build) build ;;
    test) tests ;;
    sanitize) sanitize ;;
    calls) calls ;;
    seeds) seeds ;;
    bench) shift; bench "$@"; break ;;
    profile) shift; profile "$@"; break ;;
    *) echo "bench/gpu.sh: expected build, test, sanitize, calls, seeds, bench or profile, got $1" >&2; exit 2 ;;
  esac
  shift
done
for table in "${tables[@]}"; do
  echo "=== $table"
  cat "$table"
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "all stages passed"
