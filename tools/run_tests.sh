#!/usr/bin/env bash
# Lint, types, structure, documentation and tests, from a fresh clone:
#
#   bash tools/run_tests.sh [PYTEST OPTIONS]
#
# Makes .venv if needed (see tools/environment.sh). JOBS (2) processes run the tests.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment tests
cd "${PROJECT_DIR}"
export PATH="${VENV}/bin:${PATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() {
    echo
    echo "== $1 ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
    shift
    "$@"
}

built_wheel_imports_elsewhere() {
    local folder
    folder=$(mktemp -d)
    python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "${folder}" .
    python -m pip --disable-pip-version-check install --quiet --no-deps --target "${folder}/site" "${folder}"/linvis-*.whl
    (
        cd /
        PYTHONPATH=${folder}/site python -c "
import linvis, linvis_ops, torch
assert linvis.__file__.startswith('${folder}') and linvis_ops.__file__.startswith('${folder}')
x = torch.randn(1, 6, 4)
print('wheel: linvis', linvis.__version__, tuple(linvis_ops.q_shift(x, (2, 3)).shape))"
    )
    rm -rf "${folder}"
}

shell_scripts_parse() {
    local script
    for script in tools/*.sh .ci/run; do bash -n "${script}"; done
}

step 'ruff check' ruff check .
step 'ruff format' ruff format --check .
step 'mypy' mypy
step 'import-linter' lint-imports --no-logo
step 'duplicate code' pylint --disable=all --enable=duplicate-code linvis ops/linvis_ops
step 'spelling' codespell linvis ops tools configs tests docs README.md CONTRIBUTING.md
step 'config names' python tools/misc/check_config_names.py
step 'shell scripts' shell_scripts_parse
step 'documentation' python -m sphinx -q -W --keep-going -b html docs docs/_build/html
step 'wheel' built_wheel_imports_elsewhere
step 'tests' python -m pytest -q -n "${JOBS:-2}" --dist loadfile "$@"
step 'Triton kernels in the interpreter' env TRITON_INTERPRET=1 \
    python -m pytest -q -n "${JOBS:-2}" tests/ops -k interpreter
echo
echo "all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
