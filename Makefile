# make demo    the test project on a real PostgreSQL, in a browser
# make test    all tests, in three processes; ARGS are pytest's: make test ARGS="-k session -x"
# make bench   this package beside the driver under it and other ORMs; ARGS="--quick", ARGS="--help"
#
# PYTHON chooses the interpreter, DATABASE_URL the demo's database, PORT the demo's port.

PYTHON ?= python3
export PORT ?= 8000

VENV := .venv
BIN := $(VENV)/bin
COMMA := ,
MYSQL := $(if $(filter mysql% mariadb%,$(DATABASE_URL)),$(COMMA)mysql)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
MADE := $(VENV)/made-with-$(VERSION)
FOR_DEMO := $(VENV)/has-demo,postgresql$(MYSQL)
FOR_TEST := $(VENV)/has-test
FOR_BENCH := $(VENV)/has-bench

.PHONY: demo test bench clean

demo: $(FOR_DEMO)
	@$(BIN)/python -m testproject.demo

test: ARGS ?= -n 3 --dist loadfile
test: $(FOR_TEST)
	$(BIN)/python -m pytest $(ARGS)

bench: $(FOR_BENCH)
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) .tox .demo

# Installs again only when setup.py, or the interpreter, has changed.
$(VENV)/has-%: setup.py $(MADE)
	@echo "installing .[$*] into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch '$@'

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Python 3.11 or newer is needed, '$(PYTHON)' is $(or $(VERSION),not found); choose one with: make PYTHON=python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
	  || { echo "'$(PYTHON) -m venv' does not work; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@
