#!/usr/bin/env bash
# Makes .venv with requirements.txt and this project in it, once; again when requirements.txt, pyproject.toml or the Python
# changes. Continues after an interruption. Environment: PYTHON, a Python 3.10 to 3.13 with its venv module.
# Download and disk: 1.5 and 5.5 GB with the CUDA build of torch, which runs on a CPU too; 0.3 and 1.6 GB with the CPU build,
# which pip takes where PIP_EXTRA_INDEX_URL names PyTorch's index of CPU wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable='import ensurepip, sys, venv; print(sys.version.split()[0]); sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
stamp() { echo ".venv/installed-$(cat requirements.txt pyproject.toml .venv/pyvenv.cfg | sha256sum | cut -c1-16)"; }

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    # 3.11 first: the numbers of the README were measured with it. A command that exists may still fail, as pyenv's do.
    for python in ${PYTHON:-python3.11 python3.13 python3.12 python3.10 python3}; do
        if version=$("$python" -c "$usable" 2>/dev/null); then break; fi
        version=
    done
    if [[ -z $version ]]; then
        echo "error: found no Python 3.10 to 3.13 with its venv module${PYTHON:+ (PYTHON=$PYTHON)}; install one" \
            "(Debian, Ubuntu: apt install python3-venv), or give PYTHON=/path/to/python3" >&2
        exit 2
    fi
    echo "making .venv with Python $version ($python)"
    "$python" -m venv --clear .venv
elif [[ -n ${PYTHON:-} ]] && [[ $("$PYTHON" -c "$usable") != "$(.venv/bin/python -c "$usable")" ]]; then
    echo "error: .venv has Python $(.venv/bin/python -c "$usable"), not that of PYTHON=$PYTHON; remove .venv first" >&2
    exit 2
fi

if [[ -e $(stamp) ]]; then exit 0; fi
echo "installing requirements.txt into .venv (a few minutes, once)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
touch "$(stamp)"
