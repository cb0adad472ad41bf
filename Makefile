# make demo: convert the tiny trained model and run what came out.   make test: all tests.   make lint: linters.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test lint clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DEMO)/calibration.txt: .venv/.installed examples/stdlib_text.py
	mkdir -p $(DEMO)
	$(BIN)/python examples/stdlib_text.py calibration > $@

demo: .venv/.installed $(DEMO)/calibration.txt
	$(BIN)/ir-convert examples/tiny-llama --calibration $(DEMO)/calibration.txt --sparsity 0.25 \
		--out $(DEMO)/onnx/ir-tiny.onnx --out $(DEMO)/ir-tiny --overwrite
	@echo; echo '--- ONNX Runtime:'
	$(BIN)/ir-convert generate $(DEMO)/onnx/ir-tiny.onnx 'def __init__(self, ' --max-new-tokens 48
	@echo; echo '--- Hugging Face:'
	$(BIN)/ir-convert generate $(DEMO)/ir-tiny 'The "with" statement ' --max-new-tokens 48

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
