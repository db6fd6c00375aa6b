# The two commands are `make demo` and `make test`. Each does all the set-up that it needs.
# One cargo profile (dev, optimised) serves everything, so that RocksDB is compiled once.

BIN := $(or $(CARGO_TARGET_DIR),target)/debug

.PHONY: demo test build programs setup lint check-deploy chaos bench parity gpu-bundle wheel tarball reference clean

# With CUDA=1 also the libraries that train on an NVIDIA GPU.
setup:
	@deploy/setup.sh $(if $(CUDA),--cuda)

build: setup
	cargo build --workspace --locked --bins

# Without those of the tests, which ask for nothing else of what both need: what is built for a demo is not built again for the tests.
programs: setup
	cargo build --workspace --exclude fleet-tests --locked --bins

# A coordinator, a node and four ranks train on this clone's own source and documents, then the checkpoint speaks.
demo: programs
	@deploy/demo.sh $(BIN)

test: build
	@deploy/setup.sh --tests
	cargo test --workspace --locked --no-fail-fast

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	deploy/deny.sh

# What deploy/ ships, by the tools it is for. STRICT=1 fails where one of them is missing.
check-deploy:
	deploy/check.sh $(if $(STRICT),--strict)

# Trains while coordinators are killed and stopped, for some minutes; prints its seed.
chaos: build
	$(BIN)/chaos

# fleet beside PyTorch, in turn; needs the environment that bench/README.md describes.
bench: programs
	bench/run.sh $(BIN)

# fleet against transformers, PEFT and TRL, on fresh random models, adapters and rows. PYTHON is one that has what tests/parity/requirements-live.txt names.
PYTHON ?= python3
parity: programs
	@$(PYTHON) tests/parity/live.py --bin $(BIN)

# One archive that runs the GPU tests and the GPU benchmark on a machine with a driver and a Python that has torch 2.11.0.
gpu-bundle: setup
	deploy/gpu_bundle.sh

# For pip: `pip install dist/fleet_train-*.whl` brings torch along, whose libraries the programs load.
wheel: programs
	@deploy/wheel/pack.py wheel --programs $(BIN) --out dist

# For those who have a libtorch.
tarball: programs
	@deploy/wheel/pack.py tarball --programs $(BIN) --out dist

# docs/reference, from the definitions of commands and job fields.
reference: programs
	@deploy/reference.sh $(BIN)

clean:
	cargo clean
	rm -rf .libtorch training_output dist
