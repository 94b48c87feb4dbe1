#!/usr/bin/env bash
# Sets up .venv, then lint, format check and tests, the same for people and CI. --quick leaves out the slow tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ruff check .
ruff format --check .
if [[ ${1:-} == --quick ]]; then shift; set -- -m "not slow" "$@"; fi
python -m pytest "$@"
