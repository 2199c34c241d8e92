# Every stage is a file target, artifacts/<model>/<stage>/manifest.json, which it writes last; pipeline/core/rules.py writes
# the rules. One runs again when one it reads ran again, or artifacts/<model>/.inputs/<stage> changed. Try `make help`.

MODEL_ID ?= examples/tiny-gemma3n#: Hub id or folder of the checkpoint, or of a LoRA adapter
REVISION ?=#: branch, tag or commit on the Hub; the commit is recorded
BASE ?=#: of a LoRA adapter as MODEL_ID: owner/name, owner/name@commit or a folder (default: what the adapter names)
TEMPLATE ?=#: a chat template (.jinja) in place of the checkpoint's own
CONTEXT ?=#: positions of the bundles' KV cache, as 8192 (default: the recipe's cache_length)
RECIPE ?=#: what to build and how good it must be (default: the shipped recipe for the checkpoint's model type)
GRAPHS ?=#: step, bundle or all: the step graph, the bundle's sections, or both (default: the recipe's)
TOWERS ?=#: none, vision, audio or vision,audio: what bundles take beside text (default: those that the recipe takes and the checkpoint has)
ARTIFACTS ?= artifacts#: where results go
CALIBRATION ?=#: your own text (.txt or .jsonl) that int8 and int4 are rounded by
RUNG ?=#: the rung of int8's ladder that an earlier build's manifest names, to repeat that build elsewhere
VARIANTS ?=#: the step graphs that verify judges (default: fp32 fp16 int8, the recipe's int4, the int8 it leaves out)
EVAL ?=#: your own text (.txt or .jsonl, chat conversations too) to judge on, for the recipe's
PROMPT ?= Hello#: what `make run` asks
PICTURE ?= $(if $(IN)$(filter file,$(origin IMAGE)),,$(if $(filter run,$(GOALS)),$(IMAGE)))#: a picture that `make run` asks about; IMAGE= too, but with IN=docker
AUDIO ?=#: a WAV file that `make run` asks about
PRECISION ?= int8#: the bundle that `make chat` and `make run` talk to
TASK ?=#: prompts with references (.jsonl) that `make evaluate` lets the bundles and the original answer
MINUTES ?= 30#: how long `make tune` may search
SECTION ?= int8#: what `make tune` searches: int8 or int4
FILE ?=#: the .tflite or .litertlm file that `make inspect` looks into
AGAINST ?=#: the fp32 step graph or decoder that `make inspect` holds FILE against, operator by operator
FILES ?= $(ROOT)/publish#: what `make check` looks at: a published folder, or owner/name@revision on the Hub
HF_REPO ?=#: owner/name on the Hub: `make publish` compares the publish folder with it
SPACE ?=#: owner/name of a static Space on the Hub: `make publish` compares the page, with the files' papers, with it
CONFIRM ?=#: yes: `make publish HF_REPO=…` or `SPACE=…` uploads, in one commit; HF_TOKEN in the environment
PARENT ?=#: the commit that HF_REPO or SPACE must be at (default: where it is now)
TAG ?=#: tag of the upload (default: <12 digits of the checkpoint's revision>-<8 digits of the recipe's sha256>)
SIGN_KEY ?=#: private key (elliptic curve, PEM) that `make publish` signs with; neither copied nor recorded
SIGN ?= $(if $(SIGN_KEY),key)#: keyless: `make publish` signs by sigstore, with the identity of a CI job
PUBLIC_KEY ?=#: whose signature `make check` accepts
IDENTITY ?=#: whose signature by sigstore `make check` accepts
ISSUER ?=#: who vouches for IDENTITY
LICENCE_OVERRIDE ?=#: "identifier: reason", against what the checkpoint's card says; both are published
WATCH ?=#: yes: `make job` builds what the branch has, and again whenever the model changes
RELEASE ?=#: the description in releases/ that `make release` follows
DEVICE ?= auto#: auto, cpu or cuda: where the reference of golden, moments and tune runs
THREADS ?=#: threads of the stages (default: one per core; one per worker of CLUSTER)
CLUSTER ?=#: whose workers compute golden, verify, evaluate and tune: a Dask scheduler (tcp://host:8786), or local:N processes on this machine
SERVE ?=#: yes: `make page` also shows the page on this machine, until Ctrl-C
IN ?=#: docker: run the stages in the project's container (inside it, image)
LOCK ?= $(if $(TORCH_INDEX),cpu,auto)#: cpu, cuda, macos or auto: which torch `.venv` gets (auto: macos there; else cpu if pip finds it, else PyPI's CUDA build)
TORCH_INDEX ?=#: package index with torch's CPU build, e.g. https://download.pytorch.org/whl/cpu
PYTHON ?=#: the Python, 3.11 to 3.13, that makes `.venv` (default: the first of python3.11, 3.12, 3.13 and python3 that is one)
IMAGE ?= hf-to-litert#: name of the container image; one with a digest (name@sha256:…) is pulled, not built
IMAGE_FLAGS ?=#: more options of `docker build`, e.g. --build-arg LOCK=cuda
NETWORK ?= bridge#: container network of what downloads or uploads

$(if $(filter 3.% 4.0 4.0.% 4.1 4.1.%,$(MAKE_VERSION)),$(error GNU make 4.2 or later is needed, this is $(MAKE_VERSION): on macOS, brew install make, then say gmake))
# What a user sets is a name and no text of Make, which would run a $(shell …) in it, also under -n; Make 4.4 before any other, so none stands above.
define NEWLINE


endef
SETTINGS := $(foreach q,?,$(patsubst %$q=,%,$(filter %$q=,$(subst $q=,$q= ,$(subst $(if ,) $q=,$q=,$(file <$(firstword $(MAKEFILE_LIST))))))))
$(foreach name,$(SETTINGS),$(if $(filter-out file,$(origin $(name))),$(if $(findstring $$,$(subst $$$$,,$(value $(name)))),\
	$(error $(name)=$(value $(name)) has a dollar sign, which Make reads as its own: write $$$$ for it, or rename the folder or file)))$(if $(findstring $(NEWLINE),$(value $(name))),\
	$(error $(name) has a line break, behind which Make would see a command: say it in one line)))

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-builtin-variables --warn-undefined-variables
.DELETE_ON_ERROR .SUFFIXES:
.NOTPARALLEL: # a stage uses all cores, and two at a time need the memory of both

# A word for the shell, whatever is in it.
QUOTE = '$(subst ','\'',$(1))'
# A path from the root, of which $(abspath) would make one per word.
ABSOLUTE = $(if $(1),$(if $(filter /%,$(firstword $(1))),,$(CURDIR)/)$(1))
GOALS := $(or $(MAKECMDGOALS),all)

# model-signing has an environment of its own. The key's path goes through the environment, so that it stands nowhere else.
SIGNER := .venv-sign/bin/python
CHECKS_HUB := $(if $(findstring @,$(value FILES)),yes)
SIGNS := $(if $(SIGN)$(PUBLIC_KEY)$(IDENTITY)$(ISSUER),yes)
export SIGN_KEY
export PYTHONHASHSEED ?= 0
export PYTHONNOUSERSITE := 1
# Threads that wait give their core away: beside other work the reference took 80 s instead of 234 s, with the same bytes.
export OMP_WAIT_POLICY ?= PASSIVE
export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --pretty=%ct 2>/dev/null),315532800)
$(if $(THREADS),$(eval export OMP_NUM_THREADS := $(THREADS)))

# --- where stages run -------------------------------------------------------------------------------------------------
# The Python that runs stages, what must be there first, and how: in a container by pipeline/core/container.py.
PY := $(if $(filter image,$(IN)),,.venv/bin/)python
READY = $(if $(filter docker,$(IN)),$(if $(findstring @,$(IMAGE)),,image),$(if $(IN),,.venv/.ready $(if $(CLUSTER),.venv/.cluster)))
RUN = $(if $(IN),$(if $(filter docker,$(IN)),@echo "$(1) (in $(IMAGE))" && )$(IN_CONTAINER.$(1)) python,$(PY))

# --- the rules of the stages --------------------------------------------------------------------------------------------
# Any Python that reads TOML: a host that only has Docker needs none of its own that the locks are for.
ASK = $(shell for python in $(PY) $(PYTHON) python3.11 python3 python3.12 python3.13; do if $$python -c 'import tomllib' 2>/dev/null; then echo $$python; break; fi; done)
# What needs no model does without: help works before there is a Python.
ON_SOURCES := setup release bench image test lint format clean-env
$(if $(filter image,$(IN)),$(foreach goal,$(filter $(ON_SOURCES),$(GOALS)),$(error the image can't `make $(goal)`: do that in a clone of the project)))
ifneq ($(filter-out $(ON_SOURCES) help,$(GOALS)),)
$(if $(ASK),,$(error Python 3.11, 3.12 or 3.13 is needed and not found: install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3.12))
SAID := MODEL_ID REVISION BASE TEMPLATE RECIPE CONTEXT GRAPHS TOWERS PICTURE AUDIO ARTIFACTS CALIBRATION RUNG EVAL TASK VARIANTS DEVICE CLUSTER LICENCE_OVERRIDE IN SIGNS CONFIRM HF_REPO SPACE FILE AGAINST CHECKS_HUB IMAGE NETWORK GOALS
RULES := $(shell $(ASK) -m pipeline.core.rules $(call QUOTE,FLAGS=$(filter-out --%,$(firstword $(MAKEFLAGS)))) $(call QUOTE,ENVIRONMENT=$(if $(filter undefined,$(origin MAKE_RESTARTS)),$(foreach name,$(SETTINGS),$(and $(filter environment,$(origin $(name))),$(value $(name)),$(name))))) $(foreach name,$(SAID),$(call QUOTE,$(name)=$($(name)))))
$(if $(filter-out 0,$(.SHELLSTATUS)),$(error these settings can't work, for the reason said above))
include $(RULES)
endif

# What the image says of itself: its source, and the lock that IMAGE_FLAGS chooses.
IMAGE_LOCK = locks/$(or $(patsubst LOCK=%,%,$(filter LOCK=%,$(subst --build-arg=,,$(IMAGE_FLAGS)))),cpu).txt
LABELS = --build-arg SOURCE_DATE_EPOCH --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || true)" --build-arg CHANGED="$$(git status --porcelain 2>/dev/null | head -n 1)" --build-arg LOCK_SHA256="$$(sha256sum <$(IMAGE_LOCK) | cut -d' ' -f1)"
UPLOAD = --repository $(call QUOTE,$(or $(SPACE),$(HF_REPO))) $(if $(TAG),--tag $(call QUOTE,$(TAG))) $(if $(PARENT),--parent $(call QUOTE,$(PARENT))) $(if $(CONFIRM),--confirm) $(if $(SPACE),--space)
SIGNATURE = $(if $(PUBLIC_KEY),--public-key $(call QUOTE,$(call ABSOLUTE,$(PUBLIC_KEY)))) $(if $(IDENTITY),--identity $(call QUOTE,$(IDENTITY))) $(if $(ISSUER),--issuer $(call QUOTE,$(ISSUER))) $(if $(PUBLIC_KEY)$(IDENTITY)$(ISSUER),--signer $(SIGNER))

# --- targets ----------------------------------------------------------------------------------------------------------
.DEFAULT_GOAL := all
.PHONY: all setup plan fetch golden graph towers moments fp32 fp16 int8 int4 int8-static int8-dynamic int8-static16 bundle verify publish page space release evaluate tune check inspect job reproduce compare chat run bench image test lint format clean clean-env help

all: publish ## set-up, then everything for MODEL_ID: fp32, fp16, int8, bundles, the report, the publish folder (default)
	@echo "files:   $(FILES_MADE)"
	@echo "report:  $(ROOT)/verify/report.html"
	@echo "publish: $(ROOT)/publish"
	@find $(ROOT) -maxdepth 2 -name run.json -exec cat {} + | awk '/"seconds"/ { sum += $$2 } \
		END { printf "took:    %d:%02d minutes in its stages; make plan says it of each\n", sum / 60, sum % 60 }'

setup: .venv/.ready ## make the hash-locked environment .venv (LOCK=, TORCH_INDEX=, PYTHON=)
plan: ## say what the stages will make and need, from the checkpoint's headers alone
fetch: ## get the checkpoint and check it before and after
golden: ## compute the Hugging Face fp32 reference
moments: ## keep the second moments of what layers read, which GPTQ rounds by
graph: ## export the graphs that every precision fills with weights
towers: ## build what the bundles see and hear by (TOWERS=)
fp32: ## build the files in fp32
fp16: ## build the files with fp16 weights
int8: ## build the int8 files, as the recipe's [int8] says
int8-static: ## build the step graph with int8 weights and static 8-bit activations
int8-dynamic: ## build the step graph with int8 weights and dynamic activations
int8-static16: ## build the step graph with int8 weights and static 16-bit activations (VARIANTS= to judge it)
int4: ## build the files with 4-bit weights, if the recipe says how
bundle: ## pack what LiteRT-LM runs: bundle/fp32.litertlm, bundle/int8.litertlm; int4 where the recipe names it
verify: ## judge every file against Hugging Face and fp32; write report.json and report.html
evaluate: ## score the bundles and the original on your own TASK=: exact match, chrF, BLEU
publish: $(if $(SIGN),.venv-sign/.ready) $(if $(SPACE),space) ## assemble what would be uploaded; HF_REPO= (SPACE=) compares it with the Hub, CONFIRM=yes uploads it
	$(if $(SIGN),$(PY) -m pipeline.sign $(abspath $(ROOT))/publish --by $(SIGN) --signer $(SIGNER))
	$(if $(HF_REPO)$(SPACE),$(call RUN,upload) -m pipeline.upload $(abspath $(ROOT))/$(if $(SPACE),space,publish) $(UPLOAD))
page: ## make a static page that runs the judged int8 bundle in a browser (SERVE=yes shows it); needs Node.js
	$(if $(SERVE),$(PY) -m pipeline.serve $(abspath $(ROOT))/page)
space: ## put together the page as a static Space, with the papers of its files; needs Node.js

chat: bundle ## talk to the int8 bundle in the terminal (PRECISION=)
run: bundle ## let the int8 bundle answer PROMPT= once
chat run:
	$(call RUN,$@) -m pipeline.chat $(abspath $(ROOT))/bundle/$(call QUOTE,$(PRECISION)).litertlm $(if $(filter run,$@),--prompt $(call QUOTE,$(PROMPT)) $(if $(PICTURE),--image $(call QUOTE,$(call ABSOLUTE,$(PICTURE)))) $(if $(AUDIO),--audio $(call QUOTE,$(call ABSOLUTE,$(AUDIO)))))

tune: graph moments ## search the recipe's [int8] (SECTION=int4) for MINUTES=: what costs quality where, and tune/recipe.toml for RECIPE=
	$(call RUN,tune) -m pipeline.tune $(WHERE) $(CALIBRATED) --minutes $(call QUOTE,$(MINUTES)) --section $(call QUOTE,$(SECTION)) --device $(call QUOTE,$(DEVICE)) $(if $(CLUSTER),--cluster $(call QUOTE,$(CLUSTER)))

check: $(READY) $(if $(SIGNS),.venv-sign/.ready) ## hold a published folder (FILES=, also on the Hub) against its papers and signature
	$(call RUN,check) -m pipeline.check $(call QUOTE,$(if $(findstring @,$(FILES)),$(FILES),$(call ABSOLUTE,$(FILES)))) \
		--downloads $(abspath $(ARTIFACTS))/.check $(SIGNATURE)

inspect: $(READY) ## tell what is in FILE=, and where it leaves AGAINST=
	$(call RUN,inspection) -m pipeline.inspection $(call QUOTE,$(call ABSOLUTE,$(FILE))) $(if $(AGAINST),--against $(call QUOTE,$(call ABSOLUTE,$(AGAINST))))

job: $(READY) ## print the Hub's job that builds MODEL_ID and publishes it (HF_REPO=; IMAGE= with its digest, if not the published one); CONFIRM=yes submits it
	$(call RUN,job) -m pipeline.job $(WHERE) $(call QUOTE,$(HF_REPO)) $(call QUOTE,$(if $(filter-out file,$(origin IMAGE)),$(IMAGE))) $(if $(TAG),--tag $(call QUOTE,$(TAG))) \
		$(if $(REVISION),--revision $(call QUOTE,$(REVISION))) $(if $(GRAPHS),--graphs $(GRAPHS)) $(if $(TOWERS),--towers $(TOWERS)) --device $(call QUOTE,$(DEVICE)) $(if $(WATCH),--watch $(call QUOTE,$(WATCH))) $(if $(CONFIRM),--confirm yes)

release: ## publish what a description says (RELEASE=); a dry run without CONFIRM=yes
	settings=$$($(ASK) -m tools.release $(if $(RELEASE),$(call QUOTE,$(RELEASE))) $(if $(filter yes,$(CONFIRM)),--upload)) && \
	$(MAKE) --no-print-directory publish $$settings $(foreach name,BASE TEMPLATE TOWERS CONTEXT CALIBRATION EVAL VARIANTS,$(name)=) # nothing that was not reviewed

reproduce: $(READY) ## rebuild what is finished for MODEL_ID from its manifests, and compare every file
	$(call RUN,reproduce) -m pipeline.reproduce $(WHERE) $(TEXTS)

compare: verify ## build every variant and print the table that compares them
	$(call RUN,verify) -m pipeline.report.verification $(abspath $(ROOT))/verify/report.json

bench: $(READY) ## measure speed, memory and time, on a larger random model and on Gemma 3 270M
	$(PY) -m tools.bench

image: ## build the container image (IMAGE_FLAGS=)
	DOCKER_BUILDKIT=1 docker build --tag $(IMAGE) $(LABELS) $(IMAGE_FLAGS) .

test: .venv/.ready .venv-sign/.ready .venv-vision/.ready ## set-up, then linters, types and every test
	.venv/bin/nox

lint: .venv/.ready ## linters and types only
	.venv/bin/nox -s lint types

format: .venv/.ready ## rewrite the sources in the project's format
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

clean: ## remove the results for MODEL_ID
	rm -rf $(ROOT)

clean-env: ## remove .venv and the tools' caches
	rm -rf .venv .venv-sign .venv-vision .nox .mypy_cache .ruff_cache .pytest_cache .hypothesis

help: ## list targets and settings
	@echo 'make [target …] [NAME=value …]'; echo
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo; echo 'settings (from the environment too, which make says):'; awk -F ' [?]=|#: ' '/^[A-Z_]+ [?]=.*#: / { printf "  %-17s %s\n", $$1, $$3 }' Makefile

# The lock that .venv was made from stands in the first line of .ready.
INSTALLED := $(shell sed -n '1s/^lock //p' .venv/.ready 2>/dev/null)
.venv/.ready: locks/cpu.txt locks/cuda.txt locks/macos.txt locks/dev.txt tools/setup.sh $(if $(filter auto $(INSTALLED),$(LOCK)),,CHANGED)
	@PYTHON=$(PYTHON) TORCH_INDEX=$(call QUOTE,$(TORCH_INDEX)) tools/setup.sh .venv $(call QUOTE,$(LOCK))

# Beside what set-up installs: the same versions of what both have; what the reference sees by in a folder of its own.
BESIDE = @.venv/bin/python -m pip install --require-hashes --only-binary=:all: --no-deps --disable-pip-version-check --quiet $(1) -r $< || \
	{ echo "error: pip could not install $<: see above, and say the same again$(2)"; exit 2; }
.venv/.cluster: locks/cluster.txt .venv/.ready
	$(call BESIDE,,)
	@touch $@
.venv-vision/.ready: locks/vision.txt .venv/.ready
	$(call BESIDE,--upgrade --target $(@D),; or leave eyes out: TOWERS=audio or TOWERS=none)
	@touch $@

.venv-sign/.ready: locks/sign.txt tools/setup.sh
	@PYTHON=$(PYTHON) tools/setup.sh .venv-sign sign
CHANGED:
