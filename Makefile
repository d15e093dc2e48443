# `make demo` and `make test` set up the environment in $(VENV) first, from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG := configs/detection/vig_t_maskrcnn_shapes.py
DEMO := work_dirs/demo
# OpenMP threads that wait for each other spin for some microseconds, then sleep: spinning longer
# takes the cores that others need on a busy machine, sleeping at once costs two thirds more time.
export GOMP_SPINCOUNT := 20000
# Where Python may not keep what it has compiled, each start takes three times as long.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint env help
.DEFAULT_GOAL := help

help:
	@echo 'make demo   train, evaluate and draw ViG-T Mask R-CNN on the shapes set (CPU, 8 minutes)'
	@echo 'make test   check the style and run the tests'
	@echo 'make env    set up $(VENV) only; PYTHON=python3.12 chooses the interpreter'

demo: $(READY)
	$(BIN)/python tools/train.py $(CONFIG) --work-dir $(DEMO)
	$(BIN)/python tools/image_demo.py 'data/shapes/img_dir/val/00001?.jpg' $(CONFIG) \
	    "$$(cat $(DEMO)/last_checkpoint)" --score-thr 0.5 --out-dir demo_out

# A file of tests stays in one process: its fixtures train and build what its tests share. Files
# begin in the order of tests/conftest.py.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

env: $(READY)

$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	    { echo 'error: mmvig needs Python 3.10 to 3.13, not $(PYTHON); try make PYTHON=python3.12' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile -c constraints.txt -e '.[mm,test]'
	@# opencv-python and opencv-python-headless, which the mm packages both ask for, install the
	@# same module, and the one that comes last stays. The former needs libGL, which servers lack.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || \
	    $(BIN)/pip install -c constraints.txt --force-reinstall --no-deps opencv-python-headless
	@touch $@
