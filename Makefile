# make quickstart   a real teacher, a cache, a ternary student and a page about it (CPU: about twelve minutes)
# make test         the tests, the vLLM path included
# make examples     the scripts and the notebook of examples/, as they stand, on tiny teachers
# make docs         the documentation as a site, in build/site
# make gpu-check    what one GPU does, in at most ten minutes; SIZE=toy runs everything small on a CPU
# make triton       the tests of the kernels for GPUs, and vLLM's Model Runner V2, in Triton's interpreter
# make ray          the tests of `generate --ray`, on a cluster of this machine
# make ci           lint, types, documentation and all of these tests, and gpu-check SIZE=toy
VENV ?= .venv
PYTHON ?= python3
ACCELERATOR ?= auto
RUN ?= run
SIZE ?= gpu
# Test files that run side by side; each may start a vLLM of its own, which waits now and then.
WORKERS ?= 3
PY := $(VENV)/bin/python

# Threads that spin at barriers slow each other down many times over on a shared machine.
export OMP_WAIT_POLICY ?= passive
export VENV PYTHON ACCELERATOR
# Hundreds of processes load the same modules.
unexport PYTHONDONTWRITEBYTECODE
# Whoever asked for the CPU build wants the GPU left alone; the commands would otherwise ask.
ifeq ($(ACCELERATOR),cpu)
export CUDA_VISIBLE_DEVICES :=
endif

.PHONY: quickstart test examples triton ray gpu-check gpu-check-toy docs ci lint types format clean

quickstart: $(VENV)/.ready
	VENV=$(VENV) RUN=$(RUN) examples/quickstart.sh

test: $(VENV)/.ready
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not triton and not gpu_check and not examples and not ray"

# Minutes of processor time for what a newcomer need not wait for; CI runs all four.
examples: $(VENV)/.ready
	$(PY) -m pytest -n 2 --dist loadfile -m examples tests/test_notebook.py tests/test_on_policy.py

triton: $(VENV)/.triton
	$(PY) -m pytest -n 2 --dist loadfile -m triton tests/pipeline/test_capture_invariance.py \
		tests/pipeline/test_reduce_triton.py tests/student/test_bitlinear_ops.py

ray: $(VENV)/.ray
	$(PY) -m pytest -m ray tests/pipeline/test_ray.py

gpu-check-toy: $(VENV)/.ready
	$(PY) -m pytest -m gpu_check tests/test_gpu_check.py

# Toy sizes run where there are no kernels of others to compare with.
gpu-check: $(VENV)/.ready $(if $(filter gpu,$(SIZE)),$(VENV)/.gpu-check)
	RUN=$(RUN) PYTHONPATH="benchmarks:$$PYTHONPATH" $(PY) -m gpu_check $(SIZE)

ci: lint types docs test triton examples ray gpu-check-toy

# Its notice is about the next major version of MkDocs.
docs: $(VENV)/.ready
	$(PY) -m scripts.site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.ready
	$(VENV)/bin/mypy

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.ready: requirements/cpu.lock requirements/cuda.lock pyproject.toml scripts/setup.sh
	@scripts/setup.sh

# For tests only; an environment for CUDA has one already, which goes with its torch.
$(VENV)/.triton: $(VENV)/.ready requirements/triton.txt
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install -q --no-deps -r requirements/triton.txt
	@touch $@

# The extra [ray], for tests only.
$(VENV)/.ray: $(VENV)/.ready requirements/ray.txt
	$(PY) -m pip install -q --no-deps -r requirements/ray.txt
	@touch $@

# Without them their rows say that they are not installed.
$(VENV)/.gpu-check: $(VENV)/.ready requirements/gpu-check.txt
	$(PY) -m pip install -q --no-deps -r requirements/gpu-check.txt && touch $@ || true

clean:
	rm -rf $(RUN) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
