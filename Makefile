# make demo: convert the tiny trained model and run what came out.   make test: all tests.
# make lint: linters, and whether all tests import.
# make test-interop: tests that need older packages than the rest, in .venv-interop.
# make ops: build the library of native kernels into your cache folder (with CUDA kernels where nvcc is found); print where.
PYTHON ?= python3
BIN := .venv/bin
INTEROP := .venv-interop/bin
DEMO := demo

.PHONY: demo test test-interop ops lint clean

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

# Two processes of one thread each; a file stays in one, for what its tests share, and tests/conftest.py says which come first.
test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# optimum-onnx and Triton's schema hold transformers and protobuf back; the checkpoint's own tests run on that line too.
.venv-interop/.installed: tests/interop/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-interop
	$(INTEROP)/pip install --quiet --no-compile --requirement tests/interop/requirements.txt
	$(INTEROP)/pip install --quiet --no-compile --no-deps --editable .
	touch $@

test-interop: .venv-interop/.installed
	$(INTEROP)/python -m pytest tests/interop tests/export/hf -k 'not test_variants or any_cache'

ops: .venv/.installed
	$(BIN)/python -m ir_convert.export.onnx.ops build

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --collect-only -qqq --disable-warnings

clean:
	rm -rf .venv .venv-interop $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
