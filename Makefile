# The graph: every stage is a file target, artifacts/<model>/<stage>/manifest.json, which the stage writes last.
# A stage runs again when a stage it reads ran again, or when something recorded in artifacts/<model>/.inputs/<stage>
# changed: its settings, the contents of its code, its recipe and texts, the lock. `make help` lists targets and settings.

#: MODEL_ID      Hub id or folder of the checkpoint
MODEL_ID ?= examples/tiny-gemma3n
#: REVISION      branch, tag or commit on the Hub; the commit is recorded
REVISION ?=
#: RECIPE        what to build and how good it must be
RECIPE ?= pipeline/recipes/gemma3n.toml
#: GRAPHS        step, bundle or all: the step graph, the bundle's sections, or both (default: the recipe's)
GRAPHS ?=
#: ARTIFACTS     where results go
ARTIFACTS ?= artifacts
#: CALIBRATION   your own text (.txt or .jsonl) for the full-integer file
CALIBRATION ?=
#: EVAL          your own text (.txt or .jsonl, chat conversations too) to judge on, for the recipe's
EVAL ?=
#: PROMPT        what `make run` asks
PROMPT ?= Hello
#: PRECISION     the bundle that `make chat` and `make run` talk to
PRECISION ?= int8
#: TASK          prompts with references (.jsonl) that `make evaluate` lets the bundles and the original answer
TASK ?=
#: MINUTES       how long `make tune` may search
MINUTES ?= 30
#: SECTION       what `make tune` searches: int8 or int4
SECTION ?= int8
#: FILE          the .tflite or .litertlm file that `make inspect` looks into
FILE ?=
#: AGAINST       the fp32 step graph or decoder that `make inspect` holds FILE against, operator by operator
AGAINST ?=
#: FILES         what `make check` looks at: a published folder, or owner/name@revision on the Hub
FILES ?= $(ROOT)/publish
#: HF_REPO       owner/name on the Hub: `make publish` compares the publish folder with it
HF_REPO ?=
#: CONFIRM       yes: `make publish HF_REPO=…` uploads, in one commit; HF_TOKEN in the environment
CONFIRM ?=
#: PARENT        the commit that HF_REPO must be at (default: where it is now)
PARENT ?=
#: TAG           tag of the upload (default: <12 digits of the checkpoint's revision>-<8 digits of the recipe's sha256>)
TAG ?=
#: SIGN_KEY      private key (elliptic curve, PEM) that `make publish` signs with; neither copied nor recorded
SIGN_KEY ?=
#: SIGN          keyless: `make publish` signs by sigstore, with the identity of a CI job
SIGN ?= $(if $(SIGN_KEY),key)
#: PUBLIC_KEY    whose signature `make check` accepts
PUBLIC_KEY ?=
#: IDENTITY      whose signature by sigstore `make check` accepts
IDENTITY ?=
#: ISSUER        who vouches for IDENTITY
ISSUER ?=
#: LICENCE_OVERRIDE  "identifier: reason", against what the checkpoint's card says; both are published
LICENCE_OVERRIDE ?=
#: RELEASE       the description in releases/ that `make release` follows
RELEASE ?=
#: DEVICE        auto, cpu or cuda: where the Hugging Face reference runs
DEVICE ?= auto
#: THREADS       threads of the stages (default: one per core)
THREADS ?=
#: IN            docker: run the stages in the project's container
IN ?=
#: LOCK          cpu, cuda or auto: which torch `.venv` gets (auto: cpu if pip finds it, else PyPI's CUDA build)
LOCK ?= $(if $(TORCH_INDEX),cpu,auto)
#: TORCH_INDEX   package index with torch's CPU build, e.g. https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
#: PYTHON        the Python 3.11 that makes `.venv`
PYTHON ?= python3.11
#: IMAGE         name of the container image
IMAGE ?= hf-to-litert
#: IMAGE_FLAGS   more options of `docker build`, e.g. --build-arg LOCK=cuda
IMAGE_FLAGS ?=
#: NETWORK       container network of what downloads or uploads
NETWORK ?= bridge

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-builtin-variables --warn-undefined-variables
.DELETE_ON_ERROR:
.NOTPARALLEL: # a stage uses all cores, and two at a time need the memory of both
.SUFFIXES:

# A word for the shell, whatever is in it.
QUOTE = '$(subst ','\'',$(1))'
ifneq ($(words $(MODEL_ID)) $(words $(ARTIFACTS)) $(words $(RECIPE)),1 1 1)
$(error MODEL_ID, ARTIFACTS and RECIPE are one name each, without spaces; link the folder under another name)
endif
# What Make or a shell would read as more than a name, in what was said and in where a link leads.
NAMES := $(MODEL_ID) $(ARTIFACTS) $(RECIPE) $(realpath $(MODEL_ID))
SPECIAL := $$ ' " ` ; & | < > ( ) [ ] { } * ? ! % : \ \#
ifneq ($(words $(NAMES)),$(if $(realpath $(MODEL_ID)),4,3))
$(error the folder that MODEL_ID leads to has a space in its path: $(realpath $(MODEL_ID)); rename or copy it)
endif
ODD := $(strip $(foreach sign,$(SPECIAL),$(if $(findstring $(sign),$(NAMES)),$(sign))))
ifneq ($(ODD),)
$(error MODEL_ID, ARTIFACTS and RECIPE, and where MODEL_ID leads, must not contain $(ODD) and do: $(NAMES); rename the folder or copy it)
endif
ifeq ($(filter $(IN),docker),)
ifneq ($(IN),)
$(error IN=$(IN) is unknown: leave it out, or IN=docker)
endif
endif

ifneq ($(filter-out yes,$(CONFIRM))$(if $(HF_REPO)$(filter release,$(MAKECMDGOALS)),,$(CONFIRM)),)
$(error CONFIRM=$(CONFIRM) is unknown: CONFIRM=yes, together with HF_REPO=owner/name)
endif

# --- names ------------------------------------------------------------------------------------------------------------
FOLDER := $(if $(wildcard $(MODEL_ID)/.),$(realpath $(MODEL_ID)))
MODEL := $(if $(FOLDER),$(notdir $(FOLDER)),$(subst /,--,$(MODEL_ID)))
ROOT := $(ARTIFACTS)/$(MODEL)
GOALS := $(or $(MAKECMDGOALS),all)

ifneq ($(filter-out step bundle all,$(GRAPHS)),)
$(error GRAPHS=$(GRAPHS) is unknown: step, bundle or all)
endif
CHOSEN := $(or $(GRAPHS),$(shell sed -n 's/^graphs *= *"\(.*\)".*/\1/p' $(RECIPE) 2>/dev/null),all)
# Precisions that the recipe makes bundles of.
PRECISIONS := $(shell sed -n 's/^precisions *= *\[\(.*\)\].*/\1/p' $(RECIPE) 2>/dev/null | tr -d '",')
BUNDLES := $(if $(filter step,$(CHOSEN)),,$(PRECISIONS))
SCHEME := $(shell sed -n 's/^scheme *= *"\(.*\)".*/\1/p' $(RECIPE) 2>/dev/null)
ALTERNATIVE := $(if $(filter static static16,$(SCHEME)),int8-dynamic,int8-static)
# Sections of the recipe whose weights are rounded by GPTQ.
ROUNDED := $(shell awk '/^\[/ { section = $$1 } /^gptq *= *true/ { gsub(/[][]/, "", section); print section }' $(RECIPE) 2>/dev/null)
# int4 is made where the recipe's precisions name it, and where it is asked for.
FOUR_BITS := $(filter int4,$(PRECISIONS))
#: VARIANTS      the step graphs that verify judges; publish takes fp32, fp16, int8 and the recipe's int4 of them
VARIANTS ?= $(if $(filter bundle,$(CHOSEN)),,$(strip fp32 fp16 int8 $(FOUR_BITS) $(ALTERNATIVE)))
# Texts that the recipe names.
TEXTS := $(shell sed -n 's/^\(verification\|calibration\) *= *"\(.*\)".*/\2/p' $(RECIPE) 2>/dev/null)

export PYTHONHASHSEED ?= 0
export PYTHONNOUSERSITE := 1
# Threads that wait give their core away: beside other work the reference took 80 s instead of 234 s, with the same bytes.
export OMP_WAIT_POLICY ?= PASSIVE
export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --pretty=%ct 2>/dev/null),315532800)
ifneq ($(THREADS),)
export OMP_NUM_THREADS := $(THREADS)
endif

# --- what each stage reads: stages, code, texts -------------------------------------------------------------------------
STAGES := fetch golden graph moments fp32 fp16 int8 int4 $(ALTERNATIVE) int8-static16 bundle verify publish evaluate

NEEDS_fetch :=
NEEDS_golden := fetch
NEEDS_graph := fetch
NEEDS_moments := fetch
NEEDS_fp32 := fetch graph
NEEDS_fp16 := fetch graph
# GPTQ rounds by the moments of what layers read.
NEEDS_int4 := fetch graph $(if $(filter int4,$(ROUNDED)),moments)
# The full-integer scheme takes its ranges from the fp32 file.
NEEDS_int8 := fetch graph $(if $(filter static static16,$(SCHEME)),fp32) $(if $(filter int8,$(ROUNDED)),moments)
NEEDS_$(ALTERNATIVE) := fetch graph $(if $(filter int8-static,$(ALTERNATIVE)),fp32,$(if $(filter int8,$(ROUNDED)),moments))
NEEDS_int8-static16 := fetch graph fp32
NEEDS_bundle := fetch $(BUNDLES)
NEEDS_verify := fetch golden $(sort $(VARIANTS) $(if $(BUNDLES),bundle $(BUNDLES)))
NEEDS_evaluate := fetch bundle
NEEDS_publish := $(sort fetch $(VARIANTS) $(if $(BUNDLES),bundle $(BUNDLES))) verify

ROOMS_fetch := checkpoint core export models release tflite
ROOMS_golden := checkpoint core judge reference runtime tflite
ROOMS_graph := checkpoint core export models tflite
ROOMS_moments := checkpoint core export judge models quantize reference runtime tflite
ROOMS_fp32 := bundling checkpoint core export models quantize runtime tflite
ROOMS_fp16 := bundling checkpoint core export models quantize runtime tflite
ROOMS_int4 := bundling checkpoint core export models quantize runtime tflite
ROOMS_int8 := bundling checkpoint core export judge models quantize runtime tflite
ROOMS_$(ALTERNATIVE) := $(ROOMS_int8)
ROOMS_int8-static16 := $(ROOMS_int8)
ROOMS_bundle := bundling checkpoint core export models quantize runtime tflite
ROOMS_verify := bundling checkpoint core export judge models quantize report runtime tflite
ROOMS_publish := core release
ROOMS_evaluate := checkpoint core judge reference report runtime tflite
# Not stages: they look ahead, run a result, check and rebuild what is there, search for a better recipe.
ROOMS_plan := checkpoint core export judge models planning quantize release runtime tflite
ROOMS_chat := core runtime
ROOMS_check := core release
ROOMS_inspection := bundling checkpoint core export judge models quantize report runtime tflite
ROOMS_sign := core release
ROOMS_upload := core release
ROOMS_reproduce := checkpoint core tflite
ROOMS_tune := checkpoint core export judge models quantize report runtime search tflite

# Texts that end up in a stage's result (every stage reads the recipe and depends on the lock).
TEXTS_fetch :=
TEXTS_graph :=
TEXTS_moments := $(TEXTS) $(CALIBRATION)
TEXTS_bundle :=
TEXTS_fp32 :=
TEXTS_fp16 :=
TEXTS_int4 :=
TEXTS_publish :=
TEXTS_evaluate := $(TASK)
TEXTS_golden := $(TEXTS) $(EVAL)
TEXTS_int8 := $(TEXTS) $(CALIBRATION)
TEXTS_verify := $(TEXTS) $(EVAL) $(CALIBRATION)
TEXTS_$(ALTERNATIVE) := $(TEXTS_int8)
TEXTS_int8-static16 := $(TEXTS_int8)

# model-signing has an environment of its own. The key's path goes through the environment, so that it stands nowhere else.
SIGNER := .venv-sign/bin/python
SIGNS := $(if $(SIGN)$(PUBLIC_KEY)$(IDENTITY)$(ISSUER),yes)
export SIGN_KEY
ifeq ($(IN)$(SIGNS),dockeryes)
$(error the container neither signs nor checks signatures: say it again without IN=docker, on what IN=docker made)
endif

# --- settings of each stage -------------------------------------------------------------------------------------------
WANTED := $(if $(GRAPHS),--graphs $(GRAPHS))
OPTIONS_fetch := $(if $(REVISION),--revision $(call QUOTE,$(REVISION)))
# The user's texts.
EVALUATED := $(if $(EVAL),--eval $(call QUOTE,$(abspath $(EVAL))))
CALIBRATED := $(if $(CALIBRATION),--calibration $(call QUOTE,$(abspath $(CALIBRATION))))
OPTIONS_golden := --device $(DEVICE) $(WANTED) $(EVALUATED)
OPTIONS_graph := $(WANTED)
OPTIONS_moments := $(CALIBRATED)
OPTIONS_fp32 := $(WANTED)
OPTIONS_fp16 := $(WANTED)
OPTIONS_int4 := $(WANTED)
OPTIONS_int8 := $(WANTED) $(CALIBRATED)
OPTIONS_$(ALTERNATIVE) := --scheme $(subst int8-,,$(ALTERNATIVE)) $(OPTIONS_int8)
OPTIONS_int8-static16 := --scheme static16 $(OPTIONS_int8)
OPTIONS_bundle := $(WANTED)
OPTIONS_verify := $(WANTED) --variants $(VARIANTS) $(EVALUATED) $(CALIBRATED)
OPTIONS_evaluate := $(if $(TASK),--task $(call QUOTE,$(abspath $(TASK))))
OPTIONS_upload = --repository $(call QUOTE,$(HF_REPO)) $(if $(TAG),--tag $(call QUOTE,$(TAG))) \
	$(if $(PARENT),--parent $(call QUOTE,$(PARENT))) $(if $(CONFIRM),--confirm)
OPTIONS_publish = $(WANTED) $(if $(LICENCE_OVERRIDE),--licence-override $(call QUOTE,$(LICENCE_OVERRIDE)))
OPTIONS_check = $(if $(PUBLIC_KEY),--public-key $(call QUOTE,$(abspath $(PUBLIC_KEY)))) \
	$(if $(IDENTITY),--identity $(call QUOTE,$(IDENTITY))) $(if $(ISSUER),--issuer $(call QUOTE,$(ISSUER))) \
	$(if $(PUBLIC_KEY)$(IDENTITY)$(ISSUER),--signer $(SIGNER))

# What the goals need, in order: this is planned before any of it is begun, once for the same settings.
closure = $(sort $(1) $(foreach need,$(1),$(call closure,$(NEEDS_$(need)))))
AIMS := $(patsubst $(ROOT)/%/manifest.json,%,$(GOALS))
AIMS := $(sort $(filter $(STAGES),$(AIMS)) $(if $(filter chat run,$(AIMS)),bundle) $(if $(filter compare,$(AIMS)),verify) $(if $(filter tune,$(AIMS)),graph moments))
AIMS := $(or $(AIMS),publish)
PLANNED := $(filter-out evaluate,$(filter $(call closure,$(AIMS)),$(STAGES)))
OPTIONS_plan := $(OPTIONS_fetch) $(WANTED) --stages $(PLANNED)
PLAN := $(ROOT)/.inputs/planned.$(subst $(eval ) ,-,$(AIMS))

# What `make check` has to download.
ON_HUB := $(if $(wildcard $(FILES)/.),,$(findstring @,$(FILES)))

MODULE = $(firstword $(subst -, ,$(1)))
SOURCES = pipeline/$(MODULE).py $(foreach room,$(ROOMS_$(1)),$(sort $(shell find pipeline/$(room) -type f ! -name '*.pyc')))

# A checkpoint can be large: its files are known by name, size and time. Everything else is known by its content.
# Their names go from `find` into a file and never through Make or a shell: a file can be called `$$(command).json`.
LIST_CHECKPOINT = find -L $(call QUOTE,$(FOLDER)) -maxdepth 1 -type f \( $(foreach kind,json safetensors model jinja txt md,-name '*.$(kind)' -o) \
	-name 'LICENSE*' -o -name 'NOTICE*' \) -printf '%p %s %T@\n' | LC_ALL=C sort

# Write .inputs/<stage> unless it already says the same.
define RECORD
$(shell mkdir -p $(ROOT)/.inputs && { \
	echo $(call QUOTE,options $(OPTIONS_$(1))); \
	$(if $(filter fetch,$(1)),$(if $(FOLDER),$(LIST_CHECKPOINT);)) \
	sha256sum $(call SOURCES,$(1)) $(foreach text,$(RECIPE) $(TEXTS_$(1)),$(call QUOTE,$(text))) locks/cpu.txt 2>&1 || true; \
	} >$(ROOT)/.inputs/$(1).new && \
	if cmp -s $(ROOT)/.inputs/$(1).new $(ROOT)/.inputs/$(1); then rm $(ROOT)/.inputs/$(1).new; \
	else mv $(ROOT)/.inputs/$(1).new $(ROOT)/.inputs/$(1); fi)
endef
ifneq ($(filter all compare chat run tune $(STAGES) $(ROOT)/%,$(GOALS)),)
$(foreach stage,$(STAGES),$(call RECORD,$(stage)))
endif

# --- where stages run -------------------------------------------------------------------------------------------------
PY := .venv/bin/python
ifeq ($(IN),docker)
READY := image
ONLINE := $(if $(FOLDER),,fetch plan) upload $(if $(ON_HUB),check)
# By name, so that no list of processes shows a value; what a CI job shows for itself goes to the upload alone.
SECRETS = -e HF_TOKEN -e HF_ENDPOINT $(if $(filter upload,$(1)),-e HF_OIDC_RESOURCE -e HF_OIDC_ID_TOKEN \
	-e GITHUB_ACTIONS -e ACTIONS_ID_TOKEN_REQUEST_URL -e ACTIONS_ID_TOKEN_REQUEST_TOKEN)
# Every path that a stage is told is mounted at the same path, what a checkpoint's links lead to as well; a recipe's texts
# where the recipe names them from, the project's folder.
LINKED := $(if $(FOLDER),$(shell find $(call QUOTE,$(FOLDER)) -maxdepth 1 -type l -exec readlink -f {} + | xargs -r -d '\n' dirname -- | LC_ALL=C sort -u))
READ := $(abspath $(RECIPE) $(CALIBRATION) $(EVAL) $(TASK) $(FILE) $(AGAINST) $(filter /%,$(TEXTS)) $(FOLDER) $(LINKED))
MOUNTS := $(foreach path,$(sort $(READ)),-v $(call QUOTE,$(path):$(path):ro)) \
	$(foreach text,$(filter-out /%,$(TEXTS)),-v $(call QUOTE,$(abspath $(text)):/app/$(text):ro))
IN_CONTAINER = docker run --rm $(if $(filter chat,$(1)),-it) --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
	--user "$$(id -u):$$(id -g)" $(if $(filter cuda,$(DEVICE)),--gpus all) \
	-e PYTHONHASHSEED -e SOURCE_DATE_EPOCH -e OMP_NUM_THREADS -e OMP_WAIT_POLICY \
	-e SOURCE_COMMIT="$$(git rev-parse HEAD 2>/dev/null || true)" -e SOURCE_DIRTY="$$(git status --porcelain 2>/dev/null | head -n 1)" \
	-e IMAGE_DIGEST="$$(docker image inspect --format '{{.Id}}' $(IMAGE))" \
	$(if $(filter $(1),$(ONLINE)),--network $(NETWORK) $(SECRETS),--network none -e HF_HUB_OFFLINE=1) \
	-v $(abspath $(ARTIFACTS)):$(abspath $(ARTIFACTS)) $(MOUNTS) $(IMAGE)
RUN = @echo "python -m pipeline.$(MODULE) (in $(IMAGE))" && $(call IN_CONTAINER,$(1)) python
WHERE = --model-id $(or $(FOLDER),$(MODEL_ID)) --artifacts $(abspath $(ARTIFACTS)) --recipe $(abspath $(RECIPE))
else
READY := .venv/.ready
RUN = $(PY)
WHERE = --model-id $(MODEL_ID) --artifacts $(ARTIFACTS) --recipe $(RECIPE)
endif

# What the image says of itself: its source, and the lock that IMAGE_FLAGS chooses.
IMAGE_LOCK = locks/$(or $(patsubst LOCK=%,%,$(filter LOCK=%,$(subst --build-arg=,,$(IMAGE_FLAGS)))),cpu).txt
LABELS = --build-arg REVISION="$$(git describe --always --abbrev=40 --dirty --exclude='*' 2>/dev/null || true)" \
	--build-arg LOCK_SHA256="$$(sha256sum <$(IMAGE_LOCK) | cut -d' ' -f1)"

# --- targets ----------------------------------------------------------------------------------------------------------
.PHONY: all setup plan fetch golden graph moments fp32 fp16 int8 int4 $(ALTERNATIVE) int8-static16 bundle verify publish release evaluate tune check inspect reproduce compare chat run bench image test lint format clean clean-env help

all: publish ## set-up, then everything for MODEL_ID: fp32, fp16, int8, bundles, the report, the publish folder (default)
	@echo "files:   $(foreach variant,$(VARIANTS),$(ROOT)/$(variant)/step.tflite) $(foreach bundle,$(BUNDLES),$(ROOT)/bundle/$(bundle).litertlm)"
	@echo "report:  $(ROOT)/verify/report.html"
	@echo "publish: $(ROOT)/publish"

setup: .venv/.ready ## make the hash-locked environment .venv (LOCK=, TORCH_INDEX=, PYTHON=)

plan: $(READY) ## say what the stages will make and need, from the checkpoint's headers alone
	$(call RUN,plan) -m pipeline.plan $(WHERE) $(OPTIONS_plan)

fetch: ## get the checkpoint and check it before and after
golden: ## compute the Hugging Face fp32 reference
moments: ## keep the second moments of what layers read, which GPTQ rounds by
graph: ## export the graphs that every precision fills with weights
fp32: ## build the files in fp32
fp16: ## build the files with fp16 weights
int8: ## build the int8 files, by the recipe's scheme
int8-static16: ## build the step graph with int8 weights and static 16-bit activations (VARIANTS= to judge it)
int4: ## build the files with 4-bit weights, if the recipe says how
bundle: ## pack what LiteRT-LM runs: bundle/fp32.litertlm, bundle/int8.litertlm; int4 where the recipe names it
verify: ## judge every file against Hugging Face and fp32; write report.json and report.html
evaluate: ## score the bundles and the original on your own TASK=: exact match, chrF, BLEU
publish: $(if $(SIGN),.venv-sign/.ready) ## assemble what would be uploaded; HF_REPO= compares it with the Hub, CONFIRM=yes uploads it
	$(if $(SIGN),$(PY) -m pipeline.sign $(abspath $(ROOT))/publish --by $(SIGN) --signer $(SIGNER))
	$(if $(HF_REPO),$(call RUN,upload) -m pipeline.upload $(abspath $(ROOT))/publish $(OPTIONS_upload))
$(STAGES): %: $(ROOT)/%/manifest.json

define STAGE_RULE
$(ROOT)/$(1)/manifest.json: $(foreach need,$(NEEDS_$(1)),$(ROOT)/$(need)/manifest.json) $(ROOT)/.inputs/$(1) | $(READY) $(PLAN)
	$$(call RUN,$(1)) -m pipeline.$(call MODULE,$(1)) $$(WHERE) $$(OPTIONS_$(1))
endef
$(foreach stage,$(STAGES),$(eval $(call STAGE_RULE,$(stage))))

$(PLAN): $(PLANNED:%=$(ROOT)/.inputs/%) | $(READY)
	@$(call RUN,plan) -m pipeline.plan $(WHERE) $(OPTIONS_plan)
	@touch $@

chat: bundle ## talk to the int8 bundle in the terminal (PRECISION=)
	$(call RUN,chat) -m pipeline.chat $(abspath $(ROOT))/bundle/$(PRECISION).litertlm

run: bundle ## let the int8 bundle answer PROMPT= once
	$(call RUN,run) -m pipeline.chat $(abspath $(ROOT))/bundle/$(PRECISION).litertlm --prompt $(call QUOTE,$(PROMPT))

tune: graph moments ## search the recipe's [int8] (SECTION=int4) for MINUTES=: what costs quality where, and tune/recipe.toml for RECIPE=
	$(call RUN,tune) -m pipeline.tune $(WHERE) $(CALIBRATED) --minutes $(MINUTES) --section $(SECTION)

check: $(READY) $(if $(SIGNS),.venv-sign/.ready) ## hold a published folder (FILES=, also on the Hub) against its papers and signature
	$(call RUN,check) -m pipeline.check $(call QUOTE,$(if $(ON_HUB),$(FILES),$(abspath $(FILES)))) \
		--downloads $(abspath $(ARTIFACTS))/.check $(OPTIONS_check)

inspect: $(READY) ## tell what is in FILE=, and where it leaves AGAINST=
	$(call RUN,inspection) -m pipeline.inspection $(call QUOTE,$(abspath $(FILE))) $(if $(AGAINST),--against $(call QUOTE,$(abspath $(AGAINST))))

release: ## publish what a description says (RELEASE=); a dry run without CONFIRM=yes
	settings=$$($(PYTHON) -m tools.release $(RELEASE) $(if $(filter yes,$(CONFIRM)),--upload)) && \
	$(MAKE) --no-print-directory publish $$settings

reproduce: $(READY) ## rebuild what is finished for MODEL_ID from its manifests, and compare every file
	$(call RUN,reproduce) -m pipeline.reproduce $(WHERE) $(EVALUATED) $(CALIBRATED)

compare: verify ## build every variant and print the table that compares them
	$(call RUN,verify) -m pipeline.report.verification $(abspath $(ROOT))/verify/report.json

bench: $(READY) ## measure speed, memory and time on a larger random model
	$(PY) -m tools.bench

image: ## build the container image (IMAGE_FLAGS=)
	DOCKER_BUILDKIT=1 docker build --tag $(IMAGE) $(LABELS) $(IMAGE_FLAGS) .

test: .venv/.ready .venv-sign/.ready ## set-up, then linters, types and every test
	.venv/bin/nox

lint: .venv/.ready ## linters and types only
	.venv/bin/nox -s lint types

format: .venv/.ready ## rewrite the sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove the results for MODEL_ID
	rm -rf $(ROOT)

clean-env: ## remove .venv and the tools' caches
	rm -rf .venv .venv-sign .nox .mypy_cache .ruff_cache .pytest_cache .hypothesis

help: ## list targets and settings
	@echo 'make [target …] [NAME=value …]'; echo
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo; echo 'settings:'; sed -n 's/^#: /  /p' Makefile

# The lock that .venv was made from stands in the first line of .ready.
INSTALLED := $(shell sed -n '1s/^lock //p' .venv/.ready 2>/dev/null)
.venv/.ready: locks/cpu.txt locks/cuda.txt locks/dev.txt tools/setup.sh $(if $(filter auto $(INSTALLED),$(LOCK)),,CHANGED)
	@PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) tools/setup.sh .venv $(LOCK)

.venv-sign/.ready: locks/sign.txt
	@rm -rf .venv-sign && $(PYTHON) -m venv .venv-sign
	@.venv-sign/bin/pip install --require-hashes --only-binary=:all: --disable-pip-version-check -qq -r $<
	@touch $@
CHANGED:
