#!/usr/bin/env bash
# Makes .venv and installs requirements.txt into it, once. Goes on where it was interrupted, and runs again when
# requirements.txt changes. PYTHON: a Python 3.11 (default: python3.11).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed-$(sha256sum requirements.txt | cut -c1-16)
if [[ -e $stamp ]]; then exit 0; fi

python=${PYTHON:-python3.11}
if ! command -v "$python" >/dev/null; then
    echo "error: $python not found; install Python 3.11, or give PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then "$python" -m venv .venv; fi
echo "installing requirements.txt into .venv (a few minutes, once)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
touch "$stamp"
