# `pip install -e '.[dev]'` first.
SHELL := bash
export MPLBACKEND := agg
.PHONY: test slow docs check

test:  # every notebook, then every test that takes less than a minute
	nbdev-test --n-workers 2
	python -m pytest -q -m "not slow"

slow:  # the rest: cells marked `slow`, tests marked slow
	nbdev-test --n-workers 2 --flags slow
	python -m pytest -q -m slow

docs:  # modules, outputs, docs/ and README.md from the notebooks
	nbdev-export
	nbdev-test --n-workers 2 --save
	nbdev-clean
	python tools/build_docs.py

check:  # what `make docs` writes is in step with the notebooks
	python tools/check_step.py
	python tools/build_docs.py --check
