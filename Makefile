# Every target creates its environment on the first call; a stamp per extra makes the next call instant.
PYTHON ?= python3
VENV := .venv
FLOOR := .venv-floor
PIP := -m pip install --quiet --disable-pip-version-check
OUT ?= gpu-out

# The oldest supported triton. Its interpreter breaks with numpy 2.4.
FLOOR_TRITON := 3.6.0
FLOOR_NUMPY := 2.3.5
FLOOR_PACKAGES := torch numpy setuptools expecttest hypothesis jinja2 matplotlib pytest pytest-benchmark pytest-xdist rich scikit-learn

.PHONY: bench test test-floor faults lint format gpu clean
.PRECIOUS: $(VENV)/.installed-%

bench: $(VENV)/.installed-bench
	$(VENV)/bin/python -m benchmarks $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.installed-zoo
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-floor: $(FLOOR)/.installed
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -n auto --dist loadfile -m floor $(ARGS)

faults: $(VENV)/.installed-test $(VENV)/.installed-zoo
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.planted_faults $(ARGS)

lint: $(VENV)/.installed-dev $(VENV)/.installed-zoo
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

gpu: $(VENV)/.installed-test
	PYTHON=$(abspath $(VENV))/bin/python benchmarks/gpu.sh $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) $(FLOOR) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) -c constraints.txt setuptools -e ".[$*]"
	touch $@

# The zoo's model code only: torchvision's and timm's dependencies are either here or not needed by the tests.
$(VENV)/.installed-zoo: $(VENV)/.installed-test
	$(VENV)/bin/python $(PIP) --no-deps -c constraints.txt torchvision timm
	touch $@

# triton goes in last and without resolving: a CUDA build of torch asks for the triton of its own release.
$(FLOOR)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(FLOOR)
	sed -e '/^triton==/d' -e 's/^numpy==.*/numpy==$(FLOOR_NUMPY)/' constraints.txt > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python $(PIP) -c $(FLOOR)/constraints.txt $(FLOOR_PACKAGES)
	$(FLOOR)/bin/python $(PIP) --no-deps triton==$(FLOOR_TRITON)
	$(FLOOR)/bin/python $(PIP) --no-deps -e .
	touch $@
