#!/usr/bin/env bash
# Makes .venv from requirements.lock, and installs the system packages that FFCV compiles against.
# A second call that finds everything in place does nothing. Exit code 2: the user can put it right.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly PYTHON=$VENV/bin/python
readonly STATE=$VENV/setup-state # "installing", or "complete" and the checksum of the lock
readonly LOG=$PWD/setup.log
readonly NO_NETWORK='(not|failure) resolv|name resolution|not known|dns error|unreachable|refused|timed out'

stop() {
    printf '%s\n' "$1" >&2
    exit 2
}

lock_checksum() {
    sha256sum requirements.lock | cut -d ' ' -f 1
}

# True if the last set-up ran to its end for this lock and the environment still holds all of it.
is_whole() {
    [ "$(cat "$STATE" 2>/dev/null)" = "complete $(lock_checksum)" ] || return 1
    "$PYTHON" - 2>/dev/null <<'PROGRAM'
from importlib.metadata import version
from pathlib import Path

for pin in Path("requirements.lock").read_text().split():
    name, _, wanted = pin.partition("==")
    if version(name) != wanted:
        raise SystemExit(1)
PROGRAM
}

# step TITLE COMMAND...: one line with the seconds; what the command prints goes to the log.
step() {
    local title=$1 started=$SECONDS
    shift
    printf '  %-36s' "$title"
    printf '\n== %s\n' "$title" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        printf 'failed\n'
        local hint=''
        if tail -n 40 "$LOG" | grep -qiE "$NO_NETWORK"; then hint=' (is there a network?)'; fi
        stop "Set-up stopped at: $title$hint. The whole output is in $LOG"
    fi
    printf '%4d s\n' $((SECONDS - started))
}

# is_in_range PYTHON: true if it runs (a pyenv shim may not) and is 3.11 or 3.12.
is_in_range() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

# Prints the first interpreter in range; if .venv is active, the one it was made from.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if is_in_range "$candidate"; then
            "$candidate" -c 'import sys; print(sys._base_executable)'
            return
        fi
    done
    return 1
}

# missing_packages PYTHON: names, as Debian calls them, of what cannot be found on this machine.
missing_packages() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    "$1" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    "$1" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' \
        2>/dev/null || echo "python$version-dev"
}

# require_root NAME...: stops unless packages can be installed, as root or with sudo (which may ask).
require_root() {
    command -v apt-get >/dev/null ||
        stop "Set-up found no apt-get; install these packages (Debian's names) another way: $*"
    if [ "$(id -u)" -ne 0 ] && ! sudo -n true 2>/dev/null && ! { [ -t 0 ] && sudo -v 2>/dev/null; }; then
        stop "Set-up needs root or sudo once; ask the administrator for: apt-get install $*"
    fi
}

# One list of a third party that cannot be read must not stop an install that works without it.
install_system_packages() {
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
    "${as_root[@]}" apt-get update || echo "apt-get update failed; installing all the same"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "$@"
}

# An environment of unknown origin is kept and completed; one whose set-up broke off is replaced,
# because a half-installed package can look installed.
make_environment() {
    if [ "$(cat "$STATE" 2>/dev/null)" = installing ] || ! is_in_range "$PYTHON"; then
        rm -rf "$VENV" && mkdir "$VENV" && echo installing >"$STATE" && "$1" -m venv "$VENV"
    else
        echo installing >"$STATE"
    fi
}

# The lock also pins uv, and the setuptools that builds FFCV.
install_python_packages() {
    "$PYTHON" -m pip install --retries 2 --constraint requirements.lock uv &&
        "$PYTHON" -m uv pip install --python "$PYTHON" --requirement requirements.lock \
            --build-constraints requirements.lock
}

# Also leaves the bytecode behind, which otherwise every process of a run would make for itself.
check_imports() {
    env --unset PYTHONDONTWRITEBYTECODE "$PYTHON" -c 'import cv2, ffcv, matplotlib.figure, mlflow.pytorch
import ray.train.torch, sklearn.datasets, torch.export, torchvision'
}

main() {
    if is_whole; then
        echo "Set-up: nothing to do, $VENV holds requirements.lock."
        return
    fi
    local python missing=()
    python=$(find_python) ||
        stop "Set-up needs Python 3.11 or 3.12 on the PATH; on Debian 12: apt-get install python3.11"
    { exec 9>>"$LOG"; } 2>/dev/null || stop "Set-up cannot write to $PWD: no permission or no space"
    if ! flock --nonblock 9; then
        echo "Another set-up is at work in this folder; waiting for it."
        flock 9
        if is_whole; then return; fi
    fi
    : >"$LOG"

    mapfile -t missing < <(missing_packages "$python")
    if [ ${#missing[@]} -gt 0 ]; then require_root "${missing[@]}"; fi
    echo "Setting up $VENV with $("$python" --version) (details: $LOG)"
    if [ ${#missing[@]} -gt 0 ]; then
        step "system packages (${#missing[@]})" install_system_packages "${missing[@]}"
    fi
    step "environment" make_environment "$python"
    step "Python packages ($(grep -c == requirements.lock))" install_python_packages
    step "import check" check_imports
    echo "complete $(lock_checksum)" >"$STATE"
    echo "Set up in $SECONDS s."
}

main
