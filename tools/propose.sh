#!/usr/bin/env bash
# Open a pull request from BRANCH, or renew the open one, with what a patch changes in some files, and in nothing else:
# `propose.sh PATCH MESSAGE FILE…`. Runs nothing but git and gh, beside the right to write.
set -euo pipefail
patch=$1 message=$2
if [[ ! -s "$patch" ]]; then
    echo 'nothing to propose'
    exit 0
fi
shift 2
git apply --index "${@/#/--include=}" "$patch"
git switch --create "$BRANCH"
git -c user.name='github-actions[bot]' -c user.email='41898282+github-actions[bot]@users.noreply.github.com' \
    commit --message "$message"
gh auth setup-git
git push --force origin "$BRANCH"
gh pr view "$BRANCH" --json state --jq .state 2>/dev/null | grep --quiet OPEN ||
    gh pr create --fill --head "$BRANCH"
