#!/usr/bin/env bash
# The source that a published folder was built from, checked out in `released`: `released_source.sh FOLDER`. Only what is
# in the history of the commit that is checked out here is run: its papers could name any that the repository has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

told='import json, sys; print(json.load(sys.stdin)["source"]["commit"])'
commit=$(python -c "$told" <"$1/manifests/verify.json")
git merge-base --is-ancestor "$commit" HEAD || {
    echo "::error::what was published was built from $commit, which is no ancestor of $(git rev-parse --short HEAD)" \
        "here: merge that source, or release again from this branch"
    exit 1
}
git worktree add --detach released "$commit"
