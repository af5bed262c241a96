# `pip install -e '.[dev]'` first.
SHELL := bash
export MPLBACKEND := agg
# two notebooks at a time, one core each: more threads than cores are slower than one
RUN := OMP_NUM_THREADS=1 nbdev-test --n-workers 2
.PHONY: test slow docs check

test:  # every notebook, then every test that takes less than a minute
	$(RUN)
	python -m pytest -q -m "not slow"

slow:  # the rest: cells marked `slow`, tests marked slow
	$(RUN) --flags slow --cell-timeout 1800
	python -m pytest -q -m slow

docs:  # modules, outputs, docs/ and README.md from the notebooks
	nbdev-export
	$(RUN) --save
	nbdev-clean
	python tools/build_docs.py

check:  # what `make docs` writes is in step with the notebooks
	python tools/check_step.py
	python tools/build_docs.py --check
