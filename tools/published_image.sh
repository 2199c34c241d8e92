#!/usr/bin/env bash
# The published image that holds a source, pulled: `published_image.sh LOCK [COMMIT]`, of the commit that is checked out
# if none is named. Its name with its digest is the output `image` of the step. Empty where there is none, or none that can
# be pulled, which it says: then `make IN=docker` builds it from the Dockerfile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=$1 source=${2:-HEAD} image=
mapfile -t held <releases/held.txt
while read -r commit kind name; do
    [[ "$kind" == "$lock" ]] || continue
    if git diff --quiet "$commit" "$source" -- "${held[@]}" 2>/dev/null; then image=$name; fi
done <"${IMAGES:-releases/images.txt}"
if [[ -n "$image" ]]; then
    docker pull --quiet "$image" || {
        echo "::warning::$image can't be pulled: the image is built from its Dockerfile"
        image=
    }
else
    echo "::notice::no published image holds the source of $(git rev-parse --short "$source"): it is built from its Dockerfile"
fi
echo "image=$image" >>"$GITHUB_OUTPUT"
