# make demo    environment, sample data, batch norm and deconvolution trained, scored and drawn (DATA=/path/to/cityscapes: on that)
# make test    environment, tests (ARGS="-m slow": the longer ones)
# make lint    ruff and mypy
# SET="length='2 epochs' ..." changes keys of the demo's config, ARGS=tests/norm chooses tests.
# Nothing is needed but Python >= 3.10 with pip and venv (PYTHON=python3.11 chooses one).

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
DATA ?= data/sample
$(if $(word 2,$(DATA)),$(error DATA=$(DATA): a path without blanks is needed here; make a link to the folder))
DEMO ?= runs/demo$(if $(filter-out data/sample,$(DATA)),-$(notdir $(abspath $(DATA))))
CONFIG = configs/seg/demo.yaml
OPTIONS = data.root=$(DATA) $(SET)

.PHONY: demo test lint install clean

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

data/sample/complete: | install
	$(PY) tools/make_sample.py data/sample
	touch $@

demo: install $(if $(filter data/sample,$(DATA)),data/sample/complete)
	$(PY) tools/train.py $(CONFIG) --work-dir $(DEMO)/bn --resume auto $(OPTIONS)
	$(PY) tools/train.py $(CONFIG) --work-dir $(DEMO)/deconv --resume auto norm.name=deconv $(OPTIONS)
	for run in bn deconv; do \
	  $(PY) tools/evaluate.py $(DEMO)/$$run/best.pt || exit 1; \
	done
	city=$$(ls -d '$(DATA)'/leftImg8bit/test/*/ '$(DATA)'/leftImg8bit/val/*/ 2>/dev/null | head -n 1); \
	  $(PY) tools/predict.py $(DEMO)/deconv/best.pt "$$city" --out $(DEMO)/predictions --save labels color overlay
	$(PY) tools/compare.py $(DEMO)/bn $(DEMO)/deconv --names "batch norm" "deconvolution" --out $(DEMO)/demo.png
	@echo "Look at $(DEMO)/demo.png, and at the street images labelled in $(DEMO)/predictions/overlay."

clean:
	rm -rf $(VENV) runs/demo data/sample
