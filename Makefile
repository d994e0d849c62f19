# Commands of the project. Each makes what it needs: .venv holds Python packages, pinned by constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

# What is built for the suite: the emulator, and CUDA's kernels for the two ways that products are computed. sm_75 has
# neither asynchronous copies nor tensor cores for these types, sm_90 has both; all seven architectures would take three
# times as long. Without nvcc only the emulator runs them.
TEST_BUILD := CMAKE_ARGS="-DFASTNN_EMULATOR=ON -DCMAKE_CUDA_ARCHITECTURES=75-real;90-real"
# What is built to train: CUDA for this machine's GPU, if it has one.
APP_BUILD := $(if $(shell command -v nvidia-smi),CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=native,FASTNN_CUDA=OFF)

.PHONY: train test check format bench gpu fuzz sanitize portability clean

train: $(VENV)/app  ## Train the classifier on the bundled handwritten digits: model.safetensors, model.png
	$(BIN)/fastnn train --data digits --epochs 20 --seed 0 --out model.safetensors

# Two processes, since a test keeps one core busy as a rule.
test: $(VENV)/test  ## The whole test suite, and once more the operators and training on the CUDA emulator
	$(BIN)/pytest -n 2
	FASTNN_CUDA_EMULATOR=1 $(BIN)/pytest -n 2 tests/test_cuda_operators.py tests/test_sequential.py tests/test_training_devices.py

check: $(VENV)/check  ## Linters, types and formats, and whether a source distribution holds all files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-sdist
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/check  ## Apply the formatters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

bench: $(VENV)/test  ## Benchmarks against PyTorch: benchmarks/results/*.json and the tables in README.md
	$(BIN)/python benchmarks/run.py

fuzz: $(VENV)/test  ## 30 times as many drawn cases as in the suite: more than 20,000
	FASTNN_FUZZ=30 $(BIN)/pytest -m fuzz

sanitize: $(VENV)/build  ## The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	PATH="$(abspath $(BIN)):$$PATH" tests/sanitize.sh

portability: $(VENV)/build  ## Other compilers, aarch64, and a wheel for each environment in PYTHONS
	PATH="$(abspath $(BIN)):$$PATH" tests/portability.sh

# With the packages of $(PYTHON), which needs a torch for the machine's CUDA: nothing is downloaded.
gpu:  ## On a machine with a GPU: build, tests, compute-sanitizer, benchmarks; MNIST=FOLDER trains on the files in there
	$(PYTHON) benchmarks/gpu_all.py $(if $(MNIST),--mnist "$(MNIST)")

clean:
	rm -rf $(VENV) build fastnn/_C*.so fastnn/cuda_resources.json fastnn/fastnn_emulator_test *.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; the extension is rebuilt when its sources change, or the other of its two builds is there.
$(VENV)/app: $(VENV)/bin/pip $(SOURCES)
	$(APP_BUILD) $(PIP) -e '.[app]'
	rm -f $(VENV)/test
	touch $@

$(VENV)/test: $(VENV)/bin/pip $(SOURCES)
	$(TEST_BUILD) $(PIP) -e '.[test]'
	rm -f $(VENV)/app
	touch $@

$(VENV)/build: $(VENV)/test
	$(PIP) cmake ninja pybind11
	touch $@

$(VENV)/check: $(VENV)/bin/pip $(SOURCES)
	$(TEST_BUILD) $(PIP) -e '.[test,check]'
	rm -f $(VENV)/app
	touch $(VENV)/test $@
