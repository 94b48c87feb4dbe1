#!/usr/bin/env bash
# Makes .venv, then lint, format check and tests, the same for people and CI. --quick omits the slow tests.
# Other flags go to pytest: -n 0 runs the tests in one process, one after the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ruff check .
ruff format --check .
if [[ ${1:-} == --quick ]]; then shift; set -- -m "not slow" "$@"; fi
python -m pytest -n auto --dist worksteal "$@"
