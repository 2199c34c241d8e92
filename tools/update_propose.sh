#!/usr/bin/env bash
# Open a pull request from BRANCH with what the patch `update_propose.sh PATCH` changes in the locks and the Dockerfile,
# and in nothing else; or add to the open one. Runs nothing but git and gh, beside the right to write.
set -euo pipefail
patch=$1
if [[ ! -s "$patch" ]]; then
    echo 'nothing to update'
    exit 0
fi
git apply --index --include='locks/*.txt' --include=Dockerfile "$patch"
git switch --create "$BRANCH"
git -c user.name='github-actions[bot]' -c user.email='41898282+github-actions[bot]@users.noreply.github.com' \
    commit --message 'Newer locked versions and base image'
gh auth setup-git
git push --force origin "$BRANCH"
gh pr view "$BRANCH" --json state --jq .state 2>/dev/null | grep --quiet OPEN ||
    gh pr create --fill --head "$BRANCH"
