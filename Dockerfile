# The environment and the code of the pipeline, and `make` as the entry point. Build it with `make image`, then
# `docker run -v "$PWD/artifacts:/artifacts" hf-to-litert int8`; `make IN=docker …` runs stage by stage in it.
#
#   --build-arg BASE=…          another base, of Debian: with python3.11, its venv module and CA certificates
#   --build-arg LOCK=cuda       torch for NVIDIA GPUs (run with --gpus all); the driver comes from the host
#   --build-arg TORCH_INDEX=…   where LOCK=cpu finds torch's CPU build; empty: only where pip looks anyway
#   --build-arg WHEELS=…        an image whose root folder holds wheels, for machines that see no such index
#   --secret id=ca,src=FILE     certificates to trust while installing, for networks with their own authority
ARG BASE=python:3.11-slim-bookworm@sha256:0a310eeecf4e1f5a0743f9a6520c90c88d089c903ca5fd283f501e3a805f5f89
ARG WHEELS=scratch

FROM ${WHEELS} AS wheels

FROM ${BASE}
ARG LOCK=cpu
ARG LOCK_SHA256=
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The one thing that no wheel has, where the base lacks it; what differs from one install to the next goes again.
RUN command -v make >/dev/null || { apt-get update -qq && apt-get install -qq --yes --no-install-recommends make=4.3-4.1 \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache /var/cache/apt/*.bin /var/cache/apt/archives/*; }

# One step installs the lock, so that no layer holds a download, a secret or a compiler, and takes out what only
# developers of the packages need: 340 MB of symbol tables are among it. Compiled Python files stay out too: they are
# 260 MB and save some seconds a stage.
RUN --mount=type=bind,source=locks,target=/locks \
    --mount=type=bind,source=tools,target=/tools \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    { test -z "${LOCK_SHA256}" || test "$(sha256sum <"/locks/${LOCK}.txt")" = "${LOCK_SHA256}  -"; } \
    && python3.11 -m venv /opt/venv \
    && PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_EXTRA_INDEX_URL="$(test "${LOCK}" != cpu || echo "${TORCH_INDEX}")" \
       /opt/venv/bin/python -m pip install --require-hashes --only-binary=:all: --no-compile --no-cache-dir --disable-pip-version-check \
       --quiet --find-links /wheels --requirement "/locks/${LOCK}.txt" --requirement /locks/cluster.txt \
    && PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
       /opt/venv/bin/python -m pip install --require-hashes --only-binary=:all: --no-compile --no-cache-dir --disable-pip-version-check \
       --quiet --no-deps --target /app/.venv-vision --requirement /locks/vision.txt \
    && site=/opt/venv/lib/python3.11/site-packages \
    && find "${site}/torch/bin" -type f ! -name torch_shm_manager -delete \
    && rm -rf "${site}"/torch/include "${site}"/torch/test "${site}"/tornado/test "${site}"/torchao/*.so "${site}"/pip* /opt/venv/bin/pip* \
    && find "${site}" -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} + \
    && find "${site}" -type f -regex '.*\.\(a\|c\|cc\|cpp\|cuh\|h\|hpp\|pxd\|pyi\|pyx\)' -delete \
    && python3.11 /tools/strip_libraries.py "${site}"

COPY locks/cpu.txt locks/cuda.txt locks/macos.txt /app/locks/
COPY examples /app/examples
COPY pipeline /app/pipeline
COPY LICENSE README.md Makefile /app/
COPY tools/entry.sh /app/tools/

# Any user may run it and write nowhere but /tmp and the mounted folders; tools/entry.sh goes on as the owner of
# ARTIFACTS. LOGNAME: some libraries ask for a name, and a number given with --user has none.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    LOGNAME=pipeline \
    IN=image \
    ARTIFACTS=/artifacts \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# `make image` says which commit this is, whether files differ from it, when it was made, and which lock; the step above
# has held that lock against its hash.
ARG REVISION=
ARG CHANGED=
ARG SOURCE_DATE_EPOCH=315532800
ENV SOURCE_COMMIT="${REVISION}" \
    SOURCE_DIRTY="${CHANGED}" \
    SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH}"
LABEL org.opencontainers.image.title="hf-to-litert" \
      org.opencontainers.image.description="Gemma, Qwen, Llama and SmolLM2 checkpoints to verified LiteRT files" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}${CHANGED:+-dirty}" \
      pipeline.lock="${LOCK}" \
      pipeline.lock.sha256="${LOCK_SHA256}"
WORKDIR /app
ENTRYPOINT ["/app/tools/entry.sh"]
CMD ["help"]
