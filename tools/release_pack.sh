#!/usr/bin/env bash
# What the workflow `release` hands on of MODEL_ID, what is published and what proves it: `release_pack.sh TAR` writes TAR,
# and its sha256 as an output of the step. ARTIFACTS is where results lie.
set -euo pipefail
tar=$(realpath "$1")
name=${MODEL_ID//\//--}
cd "${ARTIFACTS:-artifacts}"
tar --create --file="$tar" "$name"/{.inputs,publish,verify} "$name"/*/{manifest,run}.json
echo "sha256=$(sha256sum <"$tar" | cut -d' ' -f1)" >>"$GITHUB_OUTPUT"
