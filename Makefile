# The two commands of the README are `make demo` and `make test`; each makes its own .venv when there is none.
#   PYTHON=python3.12   the interpreter to use          TORCH=torch==2.13.0   installed unless PYTHON has a torch >= 2.10
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := $(wildcard setup.py pyproject.toml tools/compiling.py tools/nvcc.py csrc/*.[ch] csrc/*/*.[ch] csrc/shim/*.cpp cuda/*)

.PHONY: demo test bench lint format core check-cuda clean
.DELETE_ON_ERROR:

demo: .venv/installed-train
	$(BIN)/probmoe demo

# A process for each core, of one thread; `python -m pytest` runs the same tests in one process.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal

bench: .venv/installed-test
	$(BIN)/python -m benchmarks.run --record

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

core:
	$(MAKE) -C csrc

check-cuda: .venv/installed-dev
	$(BIN)/python tools/check_cuda.py

# A torch that the interpreter already has is used as it is (a CUDA build, say); otherwise TORCH is installed.
.venv/pyvenv.cfg:
	@if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet '$(TORCH)' numpy; fi
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja

.venv/built: .venv/pyvenv.cfg $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

.venv/installed-%: .venv/built pyproject.toml
	$(BIN)/python tools/requirements.py $* | $(BIN)/python -m pip install --quiet -r /dev/stdin
	@touch $@

clean:
	rm -rf build probmoe_ext/_C*.so csrc/build
