#!/usr/bin/env bash
# Make the Python environment from the hash-locked requirements: `setup.sh FOLDER cpu|cuda|auto|publish`.
#
# cpu     torch built for CPUs, from where pip is told to look: its own configuration, or TORCH_INDEX (a package index)
# cuda    PyPI's build of torch, which brings the CUDA libraries and runs on CPUs as well
# auto    cpu if pip finds that build, else cuda
# publish what the upload needs; alone, since whatever is installed could run beside the right to publish
#
# PYTHON names the interpreter (default python3.11). FOLDER/.ready is written last; it holds what was installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$1
lock=$2
python=${PYTHON:-python3.11}

die() { # what, cause, remedy: as pipeline.core.errors prints them
    printf 'error: %s\n  cause: %s\n  do:    %s\n' "$1" "$2" "$3" >&2
    exit 2
}

check_machine() {
    [[ "$(uname -sm)" == "Linux x86_64" ]] || die \
        "the locked environment is for Linux on x86-64, this is $(uname -sm)" \
        "litert-converter has wheels for few platforms and the locks name one" \
        "use a container: put IN=docker behind make (make IN=docker int8)"
    [[ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == 3.11 ]] || die \
        "Python 3.11 is needed and \`$python\` is not one" \
        "it is not installed, or is called something else" \
        "install it (Debian, Ubuntu: apt install python3.11 python3.11-venv) or name it: make setup PYTHON=/path/to/python3.11"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die \
        "\`$python\` can't make virtual environments" \
        "Debian and Ubuntu keep venv in a package of its own" \
        "apt install python3.11-venv"
}

locks() { # the files that the environment of a lock is made from: tests and linters belong to all but one
    echo "locks/$1.txt"
    [[ "$1" == publish ]] || echo locks/dev.txt
}

fingerprint() { # of what would be installed
    printf 'lock %s\n' "$1"
    locks "$1" | xargs sha256sum
}

find_lock() { # which lock `auto` means here
    local torch
    torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' locks/cpu.txt)
    if "$folder/bin/pip" install -qqq --dry-run --ignore-installed --no-deps --only-binary=:all: "$torch" 2>/dev/null; then
        echo cpu
        return
    fi
    echo "setup: pip does not find $torch, so PyPI's build of it is installed: it runs on CPUs too, but is 6 GB." >&2
    echo "setup: for the small one, stop here and run: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu" >&2
    echo cuda
}

install() {
    local options=(--require-hashes --only-binary=:all: --disable-pip-version-check --no-input)
    [[ -z "${TORCH_INDEX:-}" ]] || options+=(--extra-index-url "$TORCH_INDEX")
    [[ -t 2 ]] || options+=(-qq)
    local file
    while read -r file; do options+=(-r "$file"); done < <(locks "$lock")
    "$folder/bin/pip" install "${options[@]}" || die \
        "pip could not install locks/$lock.txt" \
        "no network to the package index, a full disk, or an index that lacks a locked file (the lines above say which)" \
        "run the same command again: nothing half-made is used$([[ $lock != cpu ]] || echo '; or make setup LOCK=cuda')"
}

if [[ -f "$folder/.ready" ]]; then
    read -r _ installed <"$folder/.ready"
    if [[ "$lock" == auto || "$lock" == "$installed" ]] && [[ "$(fingerprint "$installed")" == "$(<"$folder/.ready")" ]]; then
        touch "$folder/.ready"
        exit 0
    fi
fi
check_machine
rm -rf "$folder"
"$python" -m venv "$folder"
[[ "$lock" != auto ]] || lock=$(find_lock)
echo "setup: installing $(locks "$lock" | xargs cat | grep -c ==) locked packages ($lock) into $folder: one to five minutes" >&2
install
fingerprint "$lock" >"$folder/.ready"
echo "setup: done, $("$folder/bin/python" --version) in $folder" >&2
