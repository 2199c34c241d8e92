#!/usr/bin/env bash
# The descriptions in releases/ (RELEASES) that name a commit, so that they can have been released, as a JSON list and an
# output of the step in the workflow `reproduce`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

found=()
for file in "${RELEASES:-releases}"/*.toml; do
    if python -m tools.release "$file" --upload >&2; then found+=("$file"); fi
done
((${#found[@]})) || echo '::notice::no description names a commit: nothing is released yet'
echo "releases=$(python -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "${found[@]}")" >>"$GITHUB_OUTPUT"
