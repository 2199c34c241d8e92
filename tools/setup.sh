#!/usr/bin/env bash
# Make a Python environment from hash-locked requirements: `setup.sh FOLDER LOCK`, LOCK being auto or one of locks/*.txt.
#
# cpu     torch built for CPUs, from where pip is told to look: its own configuration, or TORCH_INDEX (a package index)
# cuda    PyPI's build of torch, which brings the CUDA libraries and runs on CPUs as well
# macos   PyPI's build of torch for macOS on arm64
# auto    on macOS macos; else cpu if pip finds that build, else cuda
# others  alone: beside the right to publish, or to sign, whatever is installed could run
#
# PYTHON names the interpreter (default: the first that fits of python3.11, python3.12, python3.13, python3; the locks are
# the same for all). FOLDER/.ready is written last; it holds what was installed.
#
# macOS has bash 3.2: no index from the end, no empty array under `set -u`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$1
lock=$2
python=''
machine=$(uname -sm)

die() { # what, cause, remedy: as pipeline.core.errors prints them
    printf 'error: %s\n  cause: %s\n  do:    %s\n' "$1" "$2" "$3" >&2
    exit 2
}

check_machine() {
    case "$machine $lock" in
        "Linux x86_64 macos" | "Darwin arm64 cpu" | "Darwin arm64 cuda") die \
            "locks/$lock.txt is not for this machine, $machine" \
            "torch is another file on Linux than on macOS" \
            "leave LOCK= and TORCH_INDEX= out: make setup" ;;
        "Linux x86_64 "* | "Darwin arm64 "*) ;;
        *) die \
            "the locked environments are for Linux on x86-64 and macOS on arm64, this is $machine" \
            "litert-converter has wheels for few platforms" \
            "use a container: put IN=docker behind make (make IN=docker int8)" ;;
    esac
}

find_python() { # the first that the locks are for and that can make environments
    local name names=(python3.11 python3.12 python3.13 python3) bare=''
    [[ -z "${PYTHON:-}" ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
        python=$name
        "$name" -c 'import ensurepip, venv' 2>/dev/null && return
        bare=$name
    done
    [[ -z "$bare" ]] || die \
        "\`$bare\` can't make virtual environments" \
        "Debian and Ubuntu keep venv in a package of its own" \
        "apt install $(basename "$bare")-venv"
    die "Python 3.11, 3.12 or 3.13 is needed, and there is none called ${names[*]}" \
        "it is not installed, or is called something else" \
        "install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3.12"
}

for_311() { # PyTorch's index has CPU builds for the others too; their hashes are not in locks/cpu.txt
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'
}

locks() { # the files that the environment of a lock is made from: tests and linters belong to those with torch
    echo "locks/$1.txt"
    case $1 in cpu | cuda | macos) echo locks/dev.txt ;; esac
}

fingerprint() { # of what would be installed
    printf 'lock %s\n' "$1"
    if command -v sha256sum >/dev/null; then locks "$1" | xargs sha256sum; else locks "$1" | xargs shasum -a 256; fi
}

find_lock() { # which lock `auto` means here
    local torch
    if [[ "$machine" == Darwin* ]]; then
        echo macos
        return
    fi
    if ! for_311; then
        echo "setup: torch's CPU build is locked for Python 3.11 alone, so PyPI's build of it is installed: it runs on CPUs too, but is 6 GB." >&2
        echo cuda
        return
    fi
    torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' locks/cpu.txt)
    if "$folder/bin/pip" install -qqq --dry-run --ignore-installed --no-deps --only-binary=:all: "$torch" 2>/dev/null; then
        echo cpu
        return
    fi
    echo "setup: pip does not find $torch, so PyPI's build of it is installed: it runs on CPUs too, but is 6 GB." >&2
    echo "setup: for the small one, stop here and run: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu" >&2
    echo cuda
}

as_pip_does() { # uv reads nothing of pip's configuration: where to look (hashes guard what comes from there), whom to trust
    local setting value word words
    while IFS='=' read -r setting value; do
        value=${value:1:${#value}-2} # out of its quotes
        read -ra words <<<"${value//\\n/ }"
        for word in ${words[@]+"${words[@]}"}; do
            case $setting in
                *.index-url) export UV_DEFAULT_INDEX=$word ;;
                *.extra-index-url) where+=(--extra-index-url "$word") ;;
                *.find-links) where+=(--find-links "$word") ;;
                *.cert) export SSL_CERT_FILE=$word ;;
            esac
        done
    done < <("$folder/bin/pip" config list | sort --reverse) # the environment's word is the last
}

by_uv() { # its cache goes with the scratch: what it has unpacked once, it never hashes again
    local scratch=$1 where=()
    as_pip_does
    "$scratch/bin/uv" pip install --python "$folder/bin/python" --cache-dir "$scratch/cache" --compile-bytecode ${quiet[@]+"${quiet[@]}"} \
        --require-hashes --only-binary=:all: --index-strategy=unsafe-best-match ${where[@]+"${where[@]}"} "${@:2}"
}

by_pip() {
    "$folder/bin/pip" install --require-hashes --only-binary=:all: --disable-pip-version-check --no-input ${quiet[@]+"${quiet[@]}"} "$@" || die \
        "pip could not install locks/$lock.txt" \
        "no network to the package index, a full disk, or an index that lacks a locked file (the lines above say which)" \
        "run the same command again: nothing half-made is used$([[ $lock != cpu ]] || echo '; or make setup LOCK=cuda')"
}

install() { # by uv, in half to three quarters of pip's time: it unpacks and compiles on all cores
    local file files=() quiet=() scratch=$folder/.scratch
    [[ -z "${TORCH_INDEX:-}" ]] || files+=(--extra-index-url "$TORCH_INDEX")
    [[ -t 2 ]] || quiet=(-q)
    while read -r file; do files+=(-r "$file"); done < <(locks "$lock")
    by_pip --no-compile --target "$scratch" -r locks/uv.txt
    if ! (by_uv "$scratch" "${files[@]}"); then
        echo "setup: uv can't, so pip tries: it may know a proxy or credentials that uv does not" >&2
        by_pip "${files[@]}"
    fi
    rm -rf "$scratch"
}

if [[ -f "$folder/.ready" ]]; then
    read -r _ installed <"$folder/.ready"
    if [[ "$lock" == auto || "$lock" == "$installed" ]] && [[ "$(fingerprint "$installed")" == "$(<"$folder/.ready")" ]]; then
        touch "$folder/.ready"
        exit 0
    fi
fi
check_machine
find_python
[[ "$lock" != cpu ]] || for_311 || die \
    "locks/cpu.txt has torch's CPU build for Python 3.11 alone, and \`$python\` is another" \
    "only that build's hash is known" \
    "make setup LOCK=cuda, which runs on CPUs too, or install Python 3.11"
echo "setup: $folder is made from $python" >&2
rm -rf "$folder"
"$python" -m venv "$folder"
[[ "$lock" != auto ]] || lock=$(find_lock)
echo "setup: installing $(locks "$lock" | xargs cat | grep -c ==) locked packages ($lock) into $folder: half a minute to five minutes" >&2
install
fingerprint "$lock" >"$folder/.ready"
echo "setup: done, $("$folder/bin/python" --version) in $folder" >&2
