# make test is the one that matters; make check is all that CI runs.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO ?= go
# The tools are modules of their own (tools/), pinned there, built on first use.
BUF ?= nice $(GO) tool -modfile=tools/buf/go.mod buf
STATICCHECK ?= $(GO) tool -modfile=tools/check/go.mod staticcheck
FUZZTIME ?= 10s
SIMULATION ?= 10m
POWERLOSS ?= 10m
FAULTS ?= 10m
SOAK ?= 1h
ROW ?=
FLAGS ?=
BASELINE := proto/testdata/baseline.binpb

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done

# Says at once what is missing, instead of failing minutes later in a linker.
.PHONY: need-go
need-go:
	@command -v $(GO) >/dev/null || { echo "dayfly needs Go 1.26 or newer, and there is no '$(GO)' in PATH: see https://go.dev/dl" >&2; exit 1; }
	@version=$$(GOTOOLCHAIN=local $(GO) env GOVERSION); version=$${version#go}; \
	IFS=. read -r major minor _ <<<"$${version%%[a-z-]*}"; \
	(( major > 1 || (major == 1 && minor >= 26) )) || { echo "dayfly needs Go 1.26 or newer, and this is $$version: see https://go.dev/dl" >&2; exit 1; }

.PHONY: need
need: need-go
	@command -v git >/dev/null || { echo "the tests need git, which isn't installed: apt-get install git" >&2; exit 1; }
	@command -v ip >/dev/null || { echo "the tests need the command ip: apt-get install iproute2" >&2; exit 1; }
	@command -v curl >/dev/null || { echo "the tests of other people's clients need curl: apt-get install curl" >&2; exit 1; }
	@command -v python3 >/dev/null || { echo "the tests of other people's clients need Python 3: apt-get install python3" >&2; exit 1; }
	@command -v npm >/dev/null || { echo "the tests of other people's clients need npm, which comes with Node: see https://nodejs.org" >&2; exit 1; }
	@version=$$(node --version 2>/dev/null) || version=none; [[ "$$version" =~ ^v([0-9]+) ]] && (( BASH_REMATCH[1] >= 20 )) || { echo "the tests of other people's clients need Node 20 or newer, and this is $$version: see https://nodejs.org" >&2; exit 1; }
	@cc=$$($(GO) env CC); command -v "$${cc%% *}" >/dev/null || { echo "the race detector needs a C compiler, and there is no '$$cc': apt-get install gcc libc6-dev" >&2; exit 1; }

# Without gRPC's pages of traces, which bring html/template: because that may call any method
# by its name, the linker would keep each of every package.
.PHONY: build
build: need-go ## the commands, into bin/
	CGO_ENABLED=0 $(GO) build -tags grpcnotrace -trimpath -ldflags='-s -w' -o bin/ ./cmd/...

# Other people's clients are a module of their own, so that nobody who uses
# dayfly compiles them. The first time they build MinIO, which takes minutes.
.PHONY: test
test: need ## go vet and every test under the race detector, e2e on built binaries included
	$(GO) vet ./...
	$(GO) -C e2e/clients vet ./...
	CGO_ENABLED=1 $(GO) -C e2e/clients test -race -timeout 30m ./...
	CGO_ENABLED=1 $(GO) test -race -timeout 30m ./...

.PHONY: race
race: test ## the same as test, which always runs the race detector

# Figures are judged as ratios to a floor of the same run, but a quiet machine is still
# the better one. ROW picks rows by a regular expression, FLAGS are more of bench's.
.PHONY: bench
bench: need-go ## every figure beside its floor (ROW=regexp, FLAGS="--output json"): ten minutes at most
	$(GO) run ./e2e/bench run --size normal --row '$(ROW)' $(FLAGS)

.PHONY: bench-large
bench-large: need-go ## the rows of 1 million grants and 10 thousand verifiers
	$(GO) run ./e2e/bench run --size large --row '$(ROW)' $(FLAGS)

.PHONY: profile
profile: need-go ## CPU, allocation, block and mutex profiles of each row (ROW=regexp), into profiles/
	$(GO) run ./e2e/bench profile --size normal --row '$(ROW)' $(FLAGS)

.PHONY: bench-go
bench-go: need-go ## every benchmark of single packages
	$(GO) test -run '^$$' -bench . -benchmem -timeout 30m ./...

.PHONY: simulation
simulation: need-go ## the simulation in new histories, for SIMULATION (10m), from a first seed of now
	$(GO) test -count=1 -timeout 0 -v -run '^TestSimulation$$' ./broker -sim.first=$$(date +%s) -sim.for=$(SIMULATION)

.PHONY: mutants
mutants: need-go ## plants each known mistake in the code, and has the simulation find it
	$(GO) run ./tools/mutants

.PHONY: powerloss
powerloss: need-go ## power losses in new histories, for POWERLOSS (10m) each of a broker and a pruning store
	DAYFLY_POWERLOSS=$(POWERLOSS) $(GO) test -count=1 -timeout 0 -v -run '^TestPowerLoss' ./e2e/powerloss

.PHONY: e2e-faults
e2e-faults: need ## faults in network namespaces one by one, then random ones for FAULTS (10m)
	DAYFLY_FAULTS=$(FAULTS) CGO_ENABLED=1 $(GO) test -race -count=1 -timeout 0 -v ./e2e/faults

# Without the race detector: memory is looked at too.
.PHONY: soak
soak: need-go ## a whole dayfly with tokens of 60s under faults for SOAK (1h); SOAK_SEED of an earlier one repeats its plan, SOAK_JSON=FILE
	$(GO) test -count=1 -timeout 0 -v -run '^TestSoak$$' ./e2e/soak -soak.for=$(SOAK) -soak.life=60s $(if $(SOAK_SEED),-soak.seed=$(SOAK_SEED)) $(if $(SOAK_JSON),-soak.json=$(abspath $(SOAK_JSON)))

# Go minimises every new input for up to a minute, if it isn't told otherwise, and
# tries nothing else meanwhile.
.PHONY: fuzz
fuzz: need ## every fuzz target for FUZZTIME (10s) each
	@for pkg in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -r -n1 dirname | sort -u); do \
	  for target in $$(grep -ho --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' "$$pkg"/*_test.go | cut -c6- | sort -u); do \
	    echo "$$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x "$$pkg"; \
	  done; \
	done

.PHONY: lint
lint: gofmt proto-lint ## gofmt, go vet, staticcheck, buf lint
	$(GO) vet ./...
	$(STATICCHECK) ./...
	$(GO) -C e2e/clients vet ./...
	$(GO) -C e2e/clients tool -modfile=../../tools/check/go.mod staticcheck ./...

.PHONY: gofmt
gofmt: need-go
	@bad=$$(git ls-files -co --exclude-standard '*.go' | xargs -r gofmt -l); \
	[[ -z "$$bad" ]] || { echo "not formatted, run gofmt -w on:" >&2; echo "$$bad" >&2; exit 1; }

.PHONY: generate
generate: need-go ## the Go code of proto/*.proto
	rm -f proto/dayfly/*/*.pb.go proto/dayfly/*/*/*.pb.go
	$(BUF) generate --template proto/buf.gen.yaml

.PHONY: generate-check
generate-check: need-go ## that the checked-in generated code is what generate makes
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(BUF) generate --template proto/buf.gen.yaml -o "$$tmp"; \
	diff -r -x '*.proto' proto/dayfly "$$tmp/proto/dayfly" || { echo "generated code is out of date: run make generate" >&2; exit 1; }

.PHONY: proto-lint
proto-lint: need-go ## buf lint
	$(BUF) lint

.PHONY: proto-breaking
proto-breaking: need-go ## that proto breaks nobody who has the committed baseline
	$(BUF) breaking --against $(BASELINE)

# Deliberate: after this, what the new baseline dropped may never be missed again.
.PHONY: proto-baseline
proto-baseline: need-go ## accept today's proto as the baseline of proto-breaking
	mkdir -p $(dir $(BASELINE))
	$(BUF) build -o $(BASELINE)

.PHONY: check
check: ## everything that CI runs
	CI=true .ci/run
