# Each target sets up what it needs. `make demo` and `make test` work on a fresh clone; each has its own environment.

PYTHON ?= python3
DEMO_ENV := .venv-demo
DEV_ENV := .venv

.PHONY: bench-check chart demo loadtest-demo test check stubs released format clean
.DELETE_ON_ERROR:

demo: $(DEMO_ENV)/installed
	@$(DEMO_ENV)/bin/grokmoe demo

# A sweep over the demo model in two minutes; the report is loadtest-demo/report.html.
loadtest-demo: $(DEMO_ENV)/installed
	@$(DEMO_ENV)/bin/grokmoe loadtest --demo --sweep --sweep-seconds 8 --sweep-steps 7 --sweep-tolerance 0.2 \
		--input-len uniform:16:96 --output-len 16 --goodput ttft:1000 tpot:150 --slo-share 0.95 --output-dir loadtest-demo

# Two workers share the machine's cores; each test process computes with one thread (tests/conftest.py).
test: $(DEV_ENV)/installed
	$(DEV_ENV)/bin/python tools/get_prometheus.py
	$(DEV_ENV)/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_FLAGS)

check: $(DEV_ENV)/installed
	$(DEV_ENV)/bin/ruff format --check .
	$(DEV_ENV)/bin/ruff check .
	$(DEV_ENV)/bin/mypy
	$(DEV_ENV)/bin/lint-imports
	$(DEV_ENV)/bin/buf lint proto
	$(DEV_ENV)/bin/buf format --diff --exit-code proto
	$(DEV_ENV)/bin/buf breaking proto --against proto/released.binpb
	$(DEV_ENV)/bin/python tools/make_stubs.py --check
	$(DEV_ENV)/bin/python tools/make_reference.py --check
	$(DEV_ENV)/bin/python tools/make_metrics.py --check
	$(DEV_ENV)/bin/python tools/make_flags.py --check
	$(DEV_ENV)/bin/python deploy/make_dashboards.py --check
	$(DEV_ENV)/bin/python deploy/chart_schema.py --check

# Counts and relative times of hot paths against those in the repository; --update by hand writes them down anew.
bench-check: $(DEV_ENV)/installed
	$(DEV_ENV)/bin/python -m benchmarks.check

# Every ready-made profile of the Helm chart as the objects that it makes, in build/chart.
chart: $(DEV_ENV)/installed
	$(DEV_ENV)/bin/python deploy/render_chart.py build/chart

stubs: $(DEV_ENV)/installed
	$(DEV_ENV)/bin/python tools/make_stubs.py

# With a release, and only then: what the next change of the contract is compared with.
released: $(DEV_ENV)/installed
	$(DEV_ENV)/bin/buf build proto --exclude-source-info -o proto/released.binpb

format: $(DEV_ENV)/installed
	$(DEV_ENV)/bin/ruff format .
	$(DEV_ENV)/bin/ruff check --fix .

# torch is asked for by its exact version, so that pip takes a build for the CPU where the index has one.
$(DEMO_ENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(DEMO_ENV)
	$(DEMO_ENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(DEMO_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[server]'
	@touch $@

$(DEV_ENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(DEV_ENV)
	$(DEV_ENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(DEV_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[server,smg,dev]'
	@touch $@

clean:
	rm -rf $(DEMO_ENV) $(DEV_ENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
