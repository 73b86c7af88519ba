# All targets work from a fresh clone: they install into .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DATA := data/demo
DEMO_RUN := runs/demo
WORKERS ?= 3
CLIPS ?= $(or $(VIDTWIN_SHARED),../shared)/data/clips
BENCHMARK_DATA ?= $(DEMO_DATA)/UCF-101
BENCHMARK_RUNS ?= runs/benchmark
BENCHMARK_MODELS := vidtwin=demo magvit2=baselines/magvit2_tiny cmd=baselines/cmd_tiny \
  ivideogpt=baselines/ivideogpt_tiny vidtwin_seed1=demo
BENCHMARK_FIT := --trainer.max_steps 200 --trainer.num_sanity_val_steps 0 --resume auto $(BENCHMARK_OPTIONS)
DATA ?= $(or $(VIDTWIN_SHARED),../shared)/data/ucf_like/UCF-101
BENCH_DATA ?= $(or $(wildcard $(DATA)),$(DEMO_DATA)/UCF-101)

.DEFAULT_GOAL := help
.PHONY: help install demo benchmark-demo bench test test-all proof compare soak tests lint types format constraints clean

help:
	@echo "make demo       train a small VidTwin on generated videos and test it (5 minutes on two idle cores)"
	@echo "make benchmark-demo  train the four tiny models, VidTwin with two seeds, and compare them: table, plots, report"
	@echo "                (12 minutes on two cores; for real clips, in a folder of their own:"
	@echo "                BENCHMARK_DATA=UCF-101 BENCHMARK_RUNS=runs/benchmark_ucf)"
	@echo "make test       linters, types, tests, README commands (about 7 minutes on two idle cores)"
	@echo "make test-all   also run the slow tests"
	@echo "make proof      overfit every model on four real clips, run each at full size (two hours; CLIPS=folder)"
	@echo "make compare    train the tiny models on UCF-101 and compare them (an hour; DATA=folder)"
	@echo "make bench      measure speed and memory of VidTwin-base on this machine (15 minutes on two idle cores)"
	@echo "make soak       kill a training twenty times, compare it with an uninterrupted one (some minutes)"
	@echo "make install    create $(VENV) and install into it"
	@echo "make format     fix the style of the sources"
	@echo "make clean      remove $(VENV), the demo's data and its results"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
	  "Expected Python 3.11 to 3.13, got %s; run: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The data set is generated once; the run and its results are replaced.
demo: install
	$(BIN)/python -m vidtwin.datamodules.synthetic $(DEMO_DATA)
	rm -rf $(DEMO_RUN)
	$(BIN)/vidtwin fit --config configs/demo.yaml --config configs/loss/efficientnet_lite0.yaml \
	  --model.loss.perceptual_frames 2
	$(BIN)/vidtwin test --config configs/demo.yaml --ckpt_path $(DEMO_RUN)/checkpoints/last.ckpt \
	  --results_dir $(DEMO_RUN)/results

# In the order of importance: what there is no time for is named. The loader reads DATA, or generated videos without it.
bench: install
	test -d "$(BENCH_DATA)" || $(BIN)/python -m vidtwin.datamodules.synthetic $(DEMO_DATA)
	$(BIN)/python benchmarks/speed.py --parts encode decode step loader "step, GAN" "step, perceptual" \
	  --data "$(BENCH_DATA)" --warmup 1 --repeats 2 --minutes 12 --out runs/bench/speed.json

# Interrupted trainings resume, and the sweep measures the missing rows. The data set is generated once.
benchmark-demo: install
ifeq ($(BENCHMARK_DATA),$(DEMO_DATA)/UCF-101)
	$(BIN)/python -m vidtwin.datamodules.synthetic $(DEMO_DATA)
endif
	for model in $(BENCHMARK_MODELS); do \
	  case $${model} in *_seed1=*) seed=1;; *) seed=0;; esac; \
	  $(BIN)/vidtwin fit --config configs/$${model#*=}.yaml $(BENCHMARK_FIT) --data.root "$(BENCHMARK_DATA)" \
	    --seed_everything $${seed} \
	    --trainer.logger.init_args.save_dir $(BENCHMARK_RUNS) --trainer.logger.init_args.name $${model%%=*} || exit; \
	done
	$(BIN)/vidtwin test --config configs/benchmark/demo.yaml --data.root "$(BENCHMARK_DATA)" \
	  --checkpoints_dir $(BENCHMARK_RUNS) --results_dir $(BENCHMARK_RUNS)/results

# Types are checked beside the tests; if they are wrong, make says so after the tests.
test: lint
	$(MAKE) --no-print-directory -j 2 types tests

test-all: lint
	$(MAKE) --no-print-directory -j 2 types tests CHOSEN=

# A worker more than two cores, of one thread each: some tests wait for processes and leave a core idle. A file of tests
# stays in one worker, which builds its fixtures once. Processes that tests start read compiled sources.
CHOSEN ?= -m "not slow"
tests: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest $(CHOSEN) -n $(WORKERS) --dist loadfile

# Resumes if interrupted; `rm -r runs/proof runs/proof_gan` starts over.
proof: install
	$(BIN)/python benchmarks/proof.py "$(CLIPS)" docs
	$(BIN)/python benchmarks/proof_baselines.py "$(CLIPS)" docs
	$(BIN)/python benchmarks/full_size.py

compare: install
	$(BIN)/python benchmarks/baselines.py docs -- --data.root "$(DATA)" --data.val_groups '[10]'

soak: install
	$(BIN)/python benchmarks/soak.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Needs uv. The addresses of package indexes stay out of the file.
constraints:
	( echo "# Versions that the tests passed with, on Python 3.11 to 3.13. Made by: make constraints"; \
	  uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	    --no-emit-index-url --no-annotate --no-header --quiet ) > constraints.txt

clean:
	rm -rf $(VENV) $(DEMO_DATA) $(DEMO_RUN)
