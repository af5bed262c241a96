# `pip install -e '.[dev]'` first.
SHELL := bash
export MPLBACKEND := agg
# two notebooks at a time, one core each: more threads than cores are slower than one
RUN := OMP_NUM_THREADS=1 nbdev-test --n-workers 2
# a process in which anything was compiled or exported cannot fork to others that train, so these run apart
COMPILES := (06_compiled|02d_onnx|03_export|07_use_your_encoder)\.ipynb
OTHERS := --skip-file-re '^([_.]|$(COMPILES))'
APART := --file-re '^$(COMPILES)'
BENCH := augment decode photos loss step end_to_end scaling processes knn evaluation plan footprint logistic embed
SECONDS_OF_FUZZ ?= 1200
SEED ?= 0
.PHONY: test slow docs check bench fuzz gpu

test:  # every notebook, then every test that takes less than a minute
	$(RUN) $(OTHERS)
	$(RUN) $(APART)
	OMP_NUM_THREADS=1 python -m pytest -q -m "not slow"

slow:  # the rest: cells marked `slow`, tests marked slow
	$(RUN) --flags slow --cell-timeout 1800 $(OTHERS)
	OMP_NUM_THREADS=1 python -m pytest -q -m slow

docs:  # modules, outputs, docs/ and README.md from the notebooks
	nbdev-export
	$(RUN) --save $(OTHERS)
	$(RUN) --save $(APART)
	nbdev-clean
	python tools/neutral_outputs.py
	python tools/build_docs.py

check:  # what `make docs` writes is in step with the notebooks
	python tools/check_step.py
	python tools/build_docs.py --check

fuzz:  # damaged images, names, layouts, options, JSON, archives, checkpoints through the commands
	python -W ignore tests/fuzz.py --seconds $(SECONDS_OF_FUZZ) --seed $(SEED)

bench:  # every benchmark without a GPU; leave the machine alone meanwhile
	@echo "About two hours on two cores. Each waits until nothing else runs, and writes its table"
	@echo "into benchmarks/RESULTS.md."
	@set -e; for name in $(BENCH); do \
	  echo; echo "$$name"; python benchmarks/common.py; time python benchmarks/$$name.py; \
	done

gpu:  # for whoever has one: what is right, then how fast, then how good; CIFAR-10 from fastai's data folder
	python -m pytest -q -m gpu -k "not compiled"
	python -m pytest -q -m gpu -k compiled
	until python benchmarks/gpu_step.py; do [ $$? = 75 ] || break; done
	until python benchmarks/gpu_cifar.py --recipe sprint; do [ $$? = 75 ] || break; done
