# Needs Python 3.11 or later with pip, and make. Everything else goes into $(VENV).
#
#   make demo      the main job: learn a prior from digits with hidden pixels
#   make test      the default tests (ARGS="-k linalg" goes to pytest)
#   make lint      ruff: rules and format
#   make types     mypy
#   make docs      the documentation, in docs/_build/html
#   make bench     every script under benchmarks/
#
# A step is repeated only when pyproject.toml has changed. Another interpreter:
# make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
# Tests compile much and compute little: one process per core, and all tests of a file in one.
JOBS ?= auto
BY_FILE := --dist loadfile --no-loadscope-reorder

# XLA's flags for tests that compute much: a level above that in tests/conftest.py.
SOME_PASSES := --xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true \
	--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1

PY := $(VENV)/bin/python

# Tests that also run in float64: those of modules with bounds of their own for it, and some of the
# others, which show that types are kept.
NUMERIC := matrices linalg solvers schedules denoisers likelihoods samplers guidance metrics \
	transport proposals curvature reading gaussian_fit params windows stationary_solve
X64_TESTS := $(wildcard $(NUMERIC:%=tests/test_%.py)) $(addprefix tests/test_, \
	training.py::test_loss_of_a_gaussian_has_a_closed_form training.py::test_images_train_too \
	training.py::test_average_in_closed_form \
	distributions.py::test_shapes_and_support distributions.py::test_log_prob_of_a_gaussian \
	distributions.py::test_the_priors_type_is_kept \
	smc.py::test_any_twist_is_exact_in_the_limit conditional_smc.py::test_statistics \
	moments.py::test_variances moments.py::test_covariances \
	posterior.py::test_gaussian_posterior_moments posterior.py::test_dtype_follows_the_prior \
	posterior.py::test_float32_where_float64_is_the_default \
	potentials.py::test_a_gaussian_factor_has_the_closed_form \
	potentials.py::test_a_log_density_that_is_not_concave \
	groups.py::test_independent_plates_are_drawn_apart \
	groups.py::test_kernels_draw_all_groups elementwise.py \
	complex.py::test_complex_sites_are_read_as_pairs \
	complex.py::test_posterior_and_evidence_have_the_closed_form)
# Tests against closed forms that are also run with XLA's default flags, instead of those for quick
# compilation in tests/conftest.py.
XLA_TESTS := tests/test_guidance.py tests/test_precision.py tests/test_proposals.py \
	tests/test_smc.py tests/test_units.py::test_many_values_of_one_unknown

.PHONY: help demo test test-slow test-x64 test-xla test-lowest lint format types docs bench clean
.DELETE_ON_ERROR:

help:
	@sed -n '3,11s/^# \{0,1\}//p' Makefile

demo: $(VENV)/stamp-examples
	$(PY) examples/digits.py $(ARGS)

test: $(VENV)/stamp-test
	$(PY) -m pytest -n $(JOBS) $(BY_FILE) $(ARGS)

# pytest's exit status 5 says that no test is marked slow, which is no failure.
test-slow: $(VENV)/stamp-test
	$(PY) -m pytest -n $(JOBS) -m "slow and not computes" --durations=10 $(ARGS) || test $$? -eq 5
	XLA_FLAGS="$(SOME_PASSES)" $(PY) -m pytest -n $(JOBS) -m computes --durations=10 $(ARGS) || \
		test $$? -eq 5

test-x64: $(VENV)/stamp-test
	JAX_ENABLE_X64=1 $(PY) -m pytest -n $(JOBS) $(BY_FILE) $(X64_TESTS) $(ARGS)

test-xla: $(VENV)/stamp-test
	XLA_FLAGS= $(PY) -m pytest -n $(JOBS) $(XLA_TESTS) $(ARGS)

# The default tests with the lowest versions that pyproject.toml allows, in an environment of their
# own.
test-lowest:
	sed -En 's/^ *"([a-z0-9_-]+)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml > .lowest.txt
	PIP_CONSTRAINT=.lowest.txt $(MAKE) test VENV=.venv-lowest ARGS="$(ARGS)"

lint: $(VENV)/stamp-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/stamp-test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/stamp-test
	$(PY) -m mypy

docs: $(VENV)/stamp-docs
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/stamp-bench
	@set -e; for script in benchmarks/*.py; do \
		echo "== $$script"; $(PY) "$$script" $(ARGS); \
	done

clean:
	rm -rf $(VENV) docs/_build build dist .mypy_cache .pytest_cache .ruff_cache

# Debian ships venv without ensurepip; the system's pip then fills the environment.
$(VENV)/stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or later is needed, '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv' || { \
		echo "error: '$(PYTHON)' has no venv module." \
			"On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
		$(PYTHON) -m venv --clear $(VENV); \
	else \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(PY) install --quiet pip || { \
		echo "error: '$(PYTHON)' has neither ensurepip nor a pip of 22.3 or later." \
			"On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@touch $@

$(VENV)/stamp-bench: PINS = "$(TORCH)"

$(VENV)/stamp-examples $(VENV)/stamp-test $(VENV)/stamp-docs $(VENV)/stamp-bench: \
$(VENV)/stamp-%: pyproject.toml $(VENV)/stamp-venv
	$(PY) -m pip install --quiet --editable ".[$*]" $(PINS)
	@touch $@
