#!/usr/bin/env bash
# Write the digest that the registry has today for the Dockerfile's base image into the Dockerfile: `update_base.sh`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dockerfile=${DOCKERFILE:-Dockerfile}
tag=$(sed -n 's/^ARG BASE=\(.*\)@sha256:.*/\1/p' "$dockerfile")
digest=$(docker buildx imagetools inspect "$tag" --format '{{.Manifest.Digest}}')
if [[ ! "$digest" =~ ^sha256:[0-9a-f]{64}$ ]]; then
    printf 'error: the registry gave no digest for %s\n  cause: it said "%s"\n' "$tag" "$digest" >&2
    exit 1
fi
sed --in-place "s|^ARG BASE=.*|ARG BASE=$tag@$digest|" "$dockerfile"
