# The project's everyday commands. `make` alone lists them.
#
# All they assume is `make` and a python3 of 3.11 or newer: `.venv` is made without ensurepip and without pip on the
# machine (tools/bootstrap/make_venv.py). Nothing here prompts. python3.13 is taken where there is one: of the versions
# that the tests run on it is the fastest. Another interpreter or place:
#   make test PYTHON=python3.11 VENV=.venv-3.11
# More for pytest, the bench or the tour:
#   make test ARGS='tests/tidy -x'        make bench ARGS='encrypt'        make run ARGS='--dir ../tour'
#   make bench PEER=unix:/run/other.sock    compares a running service with the same API
#   make bench RUNS=3 SAVE=1                the table of docs/benchmarks.md, with the ranges of three runs
#   make bench AGAINST=../older             compares with another checkout
#   make image-base image BASE=localhost/debian-python   without a registry: the base from Debian's packages (mmdebstrap)
# The tests run in four processes, since many of them wait for other processes. In one, for a debugger:
#   make test WORKERS=0 ARGS='tests/tidy --pdb'

PYTHON ?= $(shell python3.13 -c "" 2>/dev/null && echo python3.13 || echo python3)
VENV ?= .venv
ARGS ?=
WORKERS ?= 4
IMAGE ?= localhost/progressdb-minikms
BASE ?=
VM ?=
IMAGE_FLAGS ?=

BOOTSTRAP := tools/bootstrap/make_venv.py tools/bootstrap/constraints.txt $(wildcard tools/bootstrap/*.whl)
DIST ?= dist
SITE ?= site
STAMP := $(VENV)/.installed

.PHONY: help run test quick durations budgets venv frameworks lint bench torture vm cluster image image-base dist site
.DEFAULT_GOAL := help

help:
	@echo 'make run      install into $(VENV) and take the guided tour (examples/tour.py)'
	@echo 'make test     run the tests'
	@echo 'make quick    the tests that take no time, for each commit'
	@echo 'make durations  run the tests and write how long each took: tests/durations.txt'
	@echo 'make venv     make $(VENV)/bin/minikms and $(VENV)/bin/progressdb'
	@echo 'make frameworks  also install what the adapters and the manifests are tested with'
	@echo 'make lint     style, types, and import rules between packages'
	@echo 'make bench    measure speed; SAVE=1 also writes docs/benchmarks.md'
	@echo 'make torture  tests that take minutes'
	@echo 'make vm       as root, test the package in a virtual machine; VM=directory keeps its image for the next run'
	@echo 'make cluster  as root, run three message servers on a PostgreSQL of Patroni; Ctrl-C ends it'
	@echo 'make dist     make the files of a release; DIST=directory, KEY=SSH key that signs their checksums'
	@echo 'make site     make the documents a web site in $(SITE)/html, which needs no server'
	@echo 'make image    build the container image with buildah; IMAGE=name, BASE=image (docs/containers.md)'

run: venv
	$(VENV)/bin/python examples/tour.py $(ARGS)

test: venv
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadscope $(ARGS)

# A part of the project in this process alone: workers take longer to begin than such a part.
quick: venv
	$(VENV)/bin/python -m pytest -n $(if $(ARGS),0,3) --dist loadscope --quick $(ARGS)

# Lowers the numbers of tests/tidy/budgets.toml to what is there.
budgets: venv
	$(VENV)/bin/python -m tests.tidy.test_budgets

# On a machine that does nothing else, with all that CI installs. Commit the file that it writes.
durations: venv
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadscope --measure $(ARGS)

venv: $(STAMP)

# Made again when what is to be installed changed. The source is installed in editable mode, so its changes need nothing.
$(STAMP): pyproject.toml $(BOOTSTRAP)
	$(PYTHON) tools/bootstrap/make_venv.py $(VENV)

frameworks: venv
	$(VENV)/bin/python -m pip install --quiet --no-input --disable-pip-version-check --retries 10 \
		--constraint tools/bootstrap/constraints.txt --group frameworks

lint: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: venv
	$(VENV)/bin/python -m bench $(if $(SAVE),--save) $(if $(RUNS),--runs $(RUNS)) $(if $(PEER),--peer '$(PEER)') \
		$(if $(AGAINST),--against '$(AGAINST)') $(ARGS)

torture: venv
	$(VENV)/bin/python -m pytest -m torture --verbose --capture=no --durations=10 $(ARGS)

vm: venv
	MINIKMS_VM='$(VM)' $(VENV)/bin/python -m pytest -m torture --verbose --capture=no tests/torture/test_vm.py $(ARGS)

cluster: venv
	@$(VENV)/bin/python -m tests.cluster $(ARGS)

image:
	buildah build --file Containerfile $(if $(BASE),--build-arg BASE='$(BASE)') \
		--label org.opencontainers.image.version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
		--label org.opencontainers.image.revision=$$(git rev-parse HEAD) $(IMAGE_FLAGS) --tag '$(IMAGE)' .

# A base image of Debian's packages, named $(BASE). As root; mmdebstrap reaches the mirror that apt has.
image-base:
	directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && \
		mmdebstrap --variant=minbase --include=python3,ca-certificates trixie "$$directory/root.tar" && \
		printf 'FROM scratch\nADD root.tar /\n' | buildah build $(IMAGE_FLAGS) --file - --tag '$(BASE)' "$$directory"

dist:
	$(PYTHON) tools/release/dist.py $(if $(KEY),--signing-key '$(KEY)') '$(DIST)'

site: venv $(VENV)-site/.installed
	rm -rf '$(SITE)/pages' '$(SITE)/html' && mkdir -p '$(SITE)'
	$(VENV)/bin/python -m tools.site.pages '$(SITE)/pages'
	$(VENV)-site/bin/python -m sphinx -q -W --keep-going -c tools/site -d '$(SITE)/doctrees' '$(SITE)/pages' '$(SITE)/html'

# Only wheels: an sdist would run code of its own to be installed.
$(VENV)-site/.installed: tools/site/requirements.txt
	$(PYTHON) -m venv --without-pip --clear $(VENV)-site
	$(VENV)/bin/python -m pip --python $(VENV)-site/bin/python install --quiet --no-input --disable-pip-version-check \
		--retries 10 --require-hashes --no-deps --only-binary :all: -r $<
	touch $@
