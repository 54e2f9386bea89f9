# `make` lists the targets. All of them work in .venv, which they make from $(PYTHON).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= 2.10.0 2.13.0 2.14.1
CONSTRAINTS := .ci/constraints.txt
SANITIZE := --kernel-name kns=gradcampp --report-api-errors no --error-exitcode 9
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)
NATIVE_SOURCES := $(shell find csrc -type f)
BUILD_SOURCES := setup.py pyproject.toml $(wildcard _build_backend/*.py) $(NATIVE_SOURCES)
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+: .*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## explain real photographs into out/demo
	$(BIN)/python -m gradcampp_ext.demo

test: $(VENV)/test.stamp ## pytest; REQUIRE_CUDA=1 makes a missing GPU fail
	$(BIN)/pytest -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

sanitize: $(VENV)/test.stamp ## compute-sanitizer over the op's tests; needs a GPU
	REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
		$(SANITIZE) $(BIN)/pytest -x tests/test_ops.py -k cuda
	REQUIRE_CUDA=1 compute-sanitizer --tool racecheck \
		$(SANITIZE) $(BIN)/pytest -x tests/test_ops.py -k "cuda and (targets or layouts or uniform)"

sanitize-cpu: $(VENV)/test.stamp ## the CPU libraries under address, undefined and thread sanitizers
	$(BIN)/python tests/sanitize/run.py

fuzz: $(VENV)/fuzz.stamp ## 10,000 odd inputs of every kind, and 100,000 calls; prints figures
	FUZZ_CASES=10000 $(BIN)/pytest tests/test_fuzz.py
	for subject in lists annotations parquet shards model_files results specs native; do \
		$(BIN)/python tests/fuzz_guided.py $$subject -atheris_runs=10000 || exit; done
	ROBUSTNESS_CALLS=100000 $(BIN)/pytest tests/test_robustness.py

check: $(VENV)/dev.stamp ## ruff, mypy, codespell, clang-format, clang-tidy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
# The CUDA sources are read as the emulation compiles them; torch_cuda.cpp needs the CUDA toolkit.
	$(BIN)/ninja -f $$(ls -t build/native-*/build.ninja | head -n 1) -t compdb compile \
		> build/compile_commands.json
	ls csrc/cpu/*.cpp csrc/bindings/torch_cpu.cpp csrc/bindings/numpy.cpp | \
		xargs -P 2 -n 1 $(BIN)/clang-tidy --quiet -p build
	ls csrc/cuda/*.cu | xargs -P 2 -I {} $(BIN)/clang-tidy --quiet {} -- \
		-x c++ -std=c++20 -Wall -Wno-unknown-pragmas -Itests/emulation/include -Icsrc

audit: $(VENV)/audit.stamp ## known vulnerabilities of the pinned packages, asked of PyPI
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement $(CONSTRAINTS)

wheel: $(VENV)/wheel.stamp ## a wheel in dist/, tested beside each version of torch in TORCH
	$(BIN)/python tools/make_wheel.py $(TORCH)

build: $(VENV)/tools.stamp ## editable install; rebuilds what changed
	$(INSTALL) --no-build-isolation -e .

bench: $(VENV)/bench.stamp ## all benchmarks beside the peers, one JSON file each in out/bench
	$(BIN)/gradcampp bench --out out/bench

docs: $(VENV)/docs.stamp ## the documentation into out/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir out/docs

clean: ## remove what was built; .venv keeps its packages
	rm -rf build dist out *.egg-info gradcampp_ext/*.so gradcampp_ext/_build_info.json
	rm -f $(VENV)/*.stamp

# torch comes first: the native libraries are compiled against the one that will run them.
$(VENV)/tools.stamp: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools pybind11 ninja
	touch $@

$(VENV)/%.stamp: $(VENV)/tools.stamp $(BUILD_SOURCES)
	$(INSTALL) --no-build-isolation -e '.[$*]'
	touch $@

.PHONY: help demo test sanitize sanitize-cpu fuzz check audit wheel build bench docs clean
.PRECIOUS: $(VENV)/%.stamp
