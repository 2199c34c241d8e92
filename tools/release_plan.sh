#!/usr/bin/env bash
# What the workflow `release` was asked for, checked, as outputs of its step: see the step's environment there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "$UPLOAD" == true && "$GITHUB_REF" != refs/heads/main ]]; then
    echo "::error::the Hub trusts branch main alone, this is $GITHUB_REF"
    exit 1
fi
arguments=(--model "$MODEL" --revision "$REVISION" --recipe "$RECIPE" --graphs "$GRAPHS")
arguments+=(--target "$REPOSITORY" --tag "$TAG")
[[ -z "$RELEASE" ]] || arguments+=("releases/$RELEASE.toml")
[[ "$UPLOAD" != true ]] || arguments+=(--upload)
python -m tools.release "${arguments[@]}" | tee -a "$GITHUB_OUTPUT"
