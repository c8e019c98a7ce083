# Makes the virtual environment of the project; to be sourced, not run.
# shellcheck shell=bash
#
# ensure_environment [tests]: .venv with everything at the versions of requirements/lock.txt, and the test tools if asked
# for. What is there already is reused. From the environment: PYTHON (an interpreter, 3.10 to 3.13), VENV (.venv).

PROJECT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-${PROJECT_DIR}/.venv}

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if command -v "${candidate}" >/dev/null 2>&1 &&
            "${candidate}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "${candidate}"
            return
        fi
    done
    return 1
}

make_venv() {
    local python=$1
    "${python}" -m venv "${VENV}" >/dev/null 2>&1 && return
    # Debian without python3-venv has no ensurepip; pip itself can fill an environment from outside
    rm -rf "${VENV}"
    "${python}" -m venv --without-pip "${VENV}" &&
        "${python}" -m pip --python "${VENV}/bin/python" install --quiet pip ||
        fail "no virtual environment could be made with ${python}; install pip and venv (on Debian: python3-venv)."
}

ensure_environment() {
    local with=${1:-} python stamp wanted
    stamp=${VENV}/.linvis-${with:-run}
    wanted=$(cat "${PROJECT_DIR}"/requirements/*.txt "${PROJECT_DIR}/pyproject.toml" | cksum)
    if [[ -x ${VENV}/bin/python && -f ${stamp} && $(cat "${stamp}") == "${wanted}" ]]; then
        echo "environment: ${VENV} is up to date"
        return
    fi
    if [[ ! -x ${VENV}/bin/python ]]; then
        python=$(find_python) || fail "Python 3.10 to 3.13 is needed and '${PYTHON:-python3}' is not that; set PYTHON=/path/to/python."
        echo "environment: making ${VENV} with $("${python}" --version)"
        make_venv "${python}"
    fi
    echo "environment: installing (about 3 GB of downloads the first time, most of it PyTorch)"
    local pip=("${VENV}/bin/python" -m pip --disable-pip-version-check install)
    (
        cd "${PROJECT_DIR}"
        "${pip[@]}" -r requirements/lock.txt
        "${pip[@]}" --no-deps -r requirements/mm.txt
        if [[ ${with} == tests ]]; then
            "${pip[@]}" -r requirements/tests.txt -r requirements/docs.txt
        fi
        "${pip[@]}" --quiet --no-deps --editable .
    ) || fail "the installation failed; the lines above say why. Run the same command again to go on."
    echo "${wanted}" >"${stamp}"
    [[ ${with} == tests ]] && echo "${wanted}" >"${VENV}/.linvis-run"
    return 0
}
