# Commands of the project. Each makes what it needs: .venv holds Python packages, pinned by constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: train test check format bench gpu clean

train: $(VENV)/app  ## Train the classifier on the bundled handwritten digits: model.safetensors, model.png
	$(BIN)/fastnn train --data digits --epochs 20 --seed 0 --out model.safetensors

test: $(VENV)/test  ## The whole test suite
	$(BIN)/pytest

check: $(VENV)/check  ## Linters, types and formats
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

format: $(VENV)/check  ## Apply the formatters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

bench: $(VENV)/test  ## Benchmarks against PyTorch: benchmarks/results/*.json and the tables in README.md
	$(BIN)/python benchmarks/run.py

# With the packages of $(PYTHON), which needs a torch for the machine's CUDA: nothing is downloaded.
gpu:  ## On a machine with a GPU: build, tests, compute-sanitizer, benchmarks; MNIST=FOLDER trains on the files in there
	$(PYTHON) benchmarks/gpu_all.py $(if $(MNIST),--mnist "$(MNIST)")

clean:
	rm -rf $(VENV) build fastnn/_C*.so *.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; the extension is rebuilt when its sources change.
$(VENV)/app: $(VENV)/bin/pip $(SOURCES)
	$(PIP) -e '.[app]'
	touch $@

$(VENV)/test: $(VENV)/bin/pip $(SOURCES)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/check: $(VENV)/bin/pip $(SOURCES)
	$(PIP) -e '.[test,check]'
	touch $@
