#!/usr/bin/env bash
# Installs everything into .venv and runs the linter and all tests, on all cores. Arguments go to pytest.
EXTRA_REQUIREMENTS=tests/requirements.txt SUITES="metaworld adroit"
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"
ruff check .
ruff format --check .
exec python -m pytest -q -n "$(nproc)" --dist worksteal "$@"
