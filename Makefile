# The commands of a checkout; each installs what it needs first (see scripts/bootstrap.sh).

QVM := .venv/bin/qvm
PYTEST := .venv/bin/python -m pytest
CACHE := $(or $(QVM_CACHE_HOME),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qvm)
DOCKER_TOOLS := $(CACHE)/test-tools/docker-plugins
PODMAN := $(CACHE)/test-tools/podman
QEMU10 := $(CACHE)/test-tools/qemu10
# An emulated guest keeps one core busy. The tests of a file share a VM, so they stay together.
PARALLEL := -n 2 --dist loadfile
WITH_TOOLS := PATH="$$PATH:$(DOCKER_TOOLS)/bin" QVM_TEST_QEMU10="$(QEMU10)/bin"

.PHONY: help start test test-long test-quick lint bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile

start: ## install what is missing and start a VM; ARGS="dev --runtime docker" adds to `qvm start`
	@scripts/bootstrap.sh
	@$(QVM) start $(ARGS)
	@scripts/show-path-hint.sh

test: ## lint, types, unit, process and vm tests (ARGS adds to pytest)
	@scripts/bootstrap.sh --test
	@tests/tools/fetch-docker-plugins.sh "$(DOCKER_TOOLS)"
	@tests/tools/fetch-qemu10.sh "$(QEMU10)"
	@$(QVM) image build debian-13
	@$(QVM) image build debian-13 --arch aarch64
	$(WITH_TOOLS) $(PYTEST) $(PARALLEL) -m "not long" $(ARGS)

test-long: ## vm tests that take longer: foreign images, registries, every runtime, Kubernetes
	@scripts/bootstrap.sh --test
	@tests/tools/fetch-docker-plugins.sh "$(DOCKER_TOOLS)"
	@tests/tools/fetch-podman.sh "$(PODMAN)"
	@tests/tools/make-cloud-disk.sh "$(CACHE)/test-tools/cloud-disk" "$$(uname -m | sed s/arm64/aarch64/)"
	@$(QVM) image build debian-13
	$(WITH_TOOLS) $(PYTEST) -m long $(ARGS)

test-quick: ## the same without the vm tests
	@scripts/bootstrap.sh --test
	$(PYTEST) tests/unit tests/process $(ARGS)

lint: ## ruff, mypy, shellcheck, layering
	@scripts/bootstrap.sh --test
	$(PYTEST) tests/unit/test_lint.py tests/unit/test_layering.py $(ARGS)

bench: ## measured figures, phase by phase
	@scripts/bootstrap.sh
	.venv/bin/python benchmarks/start.py $(ARGS)

clean: ## remove what the checkout has built (images and VMs stay: see `qvm delete`, `qvm image rm`)
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
