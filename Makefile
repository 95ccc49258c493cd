# sidewire: every target is a plain command that can be typed by hand.
GO      ?= go
T       ?= 60s
export CGO_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help build demo test unit race soak fuzz oracle bench perf lint check deps clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

build: ## build bin/sidewire and the demo guest's init
	$(GO) build -trimpath -o bin/sidewire ./cmd/sidewire
	$(GO) build -trimpath -o bin/sidewire-guest ./cmd/sidewire-guest

demo: build deps ## boot a real guest behind sidewire and show each thing working
	bin/sidewire demo

test: deps ## unit, fuzz-seed, namespace and QEMU tests
	$(GO) test -timeout 20m -p 1 ./...

unit: ## the tests that need nothing but Go
	$(GO) test -short ./...

race: ## the unit tests under the race detector (needs a C compiler)
	CGO_ENABLED=1 $(GO) test -race -short ./...

soak: ## 100k flows at once and floods of a million (as root, for the namespace)
	SOAK=1 $(GO) test -count=1 -v -timeout 20m -run 'Scale|Hostile|LosesAtRandom' ./nat/usernet

fuzz: ## fuzz every target for T each (T=60s)
	@for p in $$($(GO) list ./...); do for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz'); do \
		echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(T) -fuzzminimizetime 50x $$p || exit 1; done; done

oracle: ## compare with KubeVirt's own webhook and types (UPDATE=1 records its answers; minutes the first time)
	cd engine/vmi/oracle && $(GO) test -timeout 20m . $(if $(UPDATE),-update)

bench: ## benchmarks of the hot functions beside the stored baseline (SAVE=1 stores one)
	$(GO) run ./perf bench $(if $(SAVE),-save)

perf: ## whole paths beside their peers, into perf/report/ (QUICK=1: three minutes)
	$(GO) run ./perf $(if $(QUICK),-quick) $(PERF)

lint: ## gofmt and vet
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	$(GO) vet ./...

check: lint test race ## all of it

deps: ## bring what demo and test need from the distribution's packages (as root)
	@.ci/deps

clean: ## remove what was built
	rm -rf bin perf/report
