# One command each. `make test` is what CI runs.
.PHONY: help build test test-all fmt lint docs demo bench fuzz deps install clean

help:
	@echo 'make build   the kso command, optimized: target/kso'
	@echo 'make test    everything that CI checks: format, lints, licences, docs, unit and end-to-end tests (as root)'
	@echo 'make test-all the same, and every suite in guests of three kernels (hours where they are emulated)'
	@echo 'make demo    kso on real programs, in about two minutes (as root)'
	@echo 'make bench   the figures of docs/bench (as root)'
	@echo 'make fuzz    each fuzz target for ten minutes (FUZZ_SECONDS=60 for one)'
	@echo 'make fmt     format the code'
	@echo 'make deps    install what these need (as root; otherwise says what to install)'
	@echo 'make install the kso command to $$(PREFIX)/bin, by default /usr/local/bin'

PREFIX ?= /usr/local
# Artifacts of the static build lie under the host's own name (.cargo/config.toml).
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
export PATH := $(HOME)/.cache/kso/tools/bin:$(HOME)/.cargo/bin:$(PATH)

build:
	@scripts/install-deps build
	cargo build --release --locked -p kso
	@ln -sfn $(HOST)/release/kso target/kso

install: build
	install -D -m 755 target/$(HOST)/release/kso $(DESTDIR)$(PREFIX)/bin/kso

deps:
	@scripts/install-deps build test demo bench

test:
	@scripts/test

test-all:
	@KSO_TEST_ALL=1 scripts/test

fmt:
	cargo fmt --all

lint:
	cargo clippy --workspace --all-targets --locked -- -D warnings

docs:
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked

demo: build
	@scripts/install-deps demo
	-@scripts/install-deps gvisor
	@scripts/demo

bench: build
	@scripts/install-deps bench kernel:6.1 virtiofsd
	cargo run --release --locked -p kso-benches --bin kso-bench -- run
	cargo run --release --locked -p kso-benches --bin kso-bench -- guest
	cargo run --release --locked -p kso-benches --bin kso-bench -- files

fuzz:
	@scripts/install-deps build
	@scripts/fuzz

clean:
	cargo clean
