#!/usr/bin/env bash
# The kernels and their bindings under sanitizers: `make sanitize`. Needs GCC, and an environment with the packages of
# `make test`, cmake, ninja and pybind11. Nothing is suppressed.
set -euo pipefail
cd "$(dirname "$0")/.."

# AddressSanitizer and UndefinedBehaviorSanitizer: the whole module, with the Python tests of kernels and bindings.
address=$PWD/build/sanitize/address
rm -rf "$address/package"  # no file that was since renamed or removed
mkdir -p "$address/package/fastnn"
tar -C fastnn --exclude='*.so' --exclude=__pycache__ -cf - . | tar -C "$address/package/fastnn" -xf -
cmake -S . -B "$address" -G Ninja -DFASTNN_SANITIZE=address,undefined -DFASTNN_CUDA=OFF \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$address/package/fastnn" \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)"
cmake --build "$address"
# The runtime replaces functions of the C++ library when it starts, so that has to be there, before torch brings it: else
# the first exception ends the process. detect_leaks=0: at exit Python and torch hold memory that nothing frees;
# test_endurance.py looks for growth instead. allocator_may_return_null=1: tests ask for more memory than there is. In
# tests/, where interpreters that tests start do not find this checkout's package either.
test_module() {
  (
    cd tests
    LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
    export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
    export PYTHONPATH=$address/package
    pytest -p no:cacheprovider --capture=sys "$@"
  )
}
# Tests beyond 2^31 elements are left out: they read gigabytes, and nothing there is read in another way.
test_module -k "not beyond_2_to_31" \
  test_{linear,conv2d,max_pool2d,activation,losses,optim,simd_math,compiled,wrong_input,pressure}.py \
  test_{binding,autograd_rules}.py

# The same two: the CUDA kernels on their emulator, on arrays of exactly their size; and kernels that must be caught.
emulator=$PWD/build/sanitize/emulator
cmake -S . -B "$emulator" -G Ninja -DFASTNN_SANITIZE=address,undefined -DFASTNN_CUDA=OFF -DFASTNN_EMULATOR=ON \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)"
cmake --build "$emulator" --target fastnn_emulator_test
FASTNN_EMULATOR_TEST=$emulator/fastnn_emulator_test test_module test_cuda_emulator.py

# ThreadSanitizer: the kernels alone. It sees no synchronisation inside libgomp, which is not built for it, and would
# call every OpenMP loop a race; so loops run on fastnn's own threads, through the same code that runs tasks.
thread=build/sanitize/thread
cmake -S . -B $thread -G Ninja -DFASTNN_SANITIZE=thread -DFASTNN_KERNEL_TESTS=ON
cmake --build $thread
$thread/kernel_threads
$thread/kernel_operators own-threads
