#!/usr/bin/env bash
# The image's entry point: `entry.sh [target …] [NAME=value …]` is `make` with these words, in the image;
# `entry.sh python …` is a command of the pipeline, as `make IN=docker` runs it there; `entry.sh scheduler …` and
# `entry.sh worker ADDRESS …` are Dask's, for CLUSTER= (docs/cluster.md).
#
# Started as root it goes on as the owner of ARTIFACTS (as nobody, if there is none), without a capability: what it
# writes belongs to the caller. With --user it is who it is told to be. A signal reaches all that it started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ "${1:-}" != /app/tools/entry.sh ]] || shift # a job's command may stand behind the entry point or in its place
artifacts=${ARTIFACTS:-/artifacts}
command=(make "$@")
case ${1:-} in
    python) command=("$@") ;;
    scheduler) # needs no folder of anybody's, but one for scratch: /dev/shm can be written to on a read-only root too
        command=(python -m dask scheduler --no-dashboard "${@:2}")
        export TMPDIR=/dev/shm
        ;;
    worker) # a model's memory is planned for, and so is each thread
        command=(python -m dask worker --nthreads 1 --memory-limit 0 --no-dashboard "${@:2}")
        export PYTHONPATH=$PWD OMP_WAIT_POLICY=PASSIVE
        ;;
esac

# As pipeline/cluster/dask.py has it: on a busy machine 30 s pass in which a process reads nothing.
export DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP=${DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP:-300s}

die() { # what, cause, remedy: as pipeline.core.errors prints them
    printf 'error: %s\n  cause: %s\n  do:    %s\n' "$1" "$2" "$3" >&2
    exit 2
}

for word in "$@"; do
    [[ "$word" != ARTIFACTS=* ]] || artifacts=${word#*=}
done

as=()
if [[ $EUID == 0 ]]; then
    owner=$(stat --format='--reuid=%u --regid=%g' "$artifacts" 2>/dev/null || echo '--reuid=65534 --regid=65534')
    read -ra owner <<<"$owner"
    as=(setpriv "${owner[@]}" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all)
    "${as[@]}" true 2>/dev/null || as=() # the engine took what that needs (--cap-drop ALL), and with it root's powers
fi

if [[ ${command[0]} == make && "$*" != help || ${1:-} == worker ]]; then
    [[ -d "$artifacts" ]] || die \
        "there is no folder $artifacts to write to" \
        "no folder of yours is mounted there" \
        "mkdir -p artifacts, then docker run -v \"\$PWD/artifacts:$artifacts\" and so on"
    "${as[@]}" test -w "$artifacts" || die \
        "$artifacts can't be written to" \
        "it belongs to user $(stat --format=%u "$artifacts"), this runs as user $EUID; or it is mounted read-only" \
        "mount a folder of your own, and leave --user out or say --user \"\$(id -u):\$(id -g)\""
    if ! "${as[@]}" test -w "${TMPDIR:-/tmp}"; then # --read-only without --tmpfs /tmp
        export TMPDIR=$artifacts/.tmp HOME=$artifacts/.tmp
        "${as[@]}" mkdir -p "$TMPDIR"
    fi
    [[ ${1:-} != worker ]] || command+=(--local-directory "${TMPDIR:-/tmp}")
fi

# A terminal reaches all by itself, and `chat` wants to read from it.
[[ ! -t 0 ]] || exec "${as[@]}" "${command[@]}"
# Else what the engine sends reaches this process alone, and make keeps SIGINT to itself: so a group of their own gets it.
set -m
"${as[@]}" "${command[@]}" <&0 &
group=$!
trap 'kill -s INT -- "-$group"' INT
trap 'kill -s TERM -- "-$group"' TERM
code=0
wait "$group" 2>/dev/null || code=$?
while kill -0 "$group" 2>/dev/null; do # a signal ends `wait` before what it waits for
    code=0
    wait "$group" 2>/dev/null || code=$?
done
exit "$code"
