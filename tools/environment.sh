# Makes the virtual environment of the project; to be sourced, not run.
# shellcheck shell=bash
#
# ensure_environment [tests]: .venv with everything at the versions of requirements/lock.txt, and the test tools if asked
# for. What is there already is reused. From the environment: PYTHON (an interpreter, 3.10 to 3.13), VENV (.venv).

PROJECT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath --canonicalize-missing "${VENV:-${PROJECT_DIR}/.venv}")  # absolute: scripts change the folder

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

# Debian without python3-venv has no ensurepip, and its pip may be too old (before 22.3) to fill another environment: so
# that pip fetches a current one, which installs itself.
install_pip() {
    local python=$1 fetched status=0
    fetched=$(mktemp -d) || return
    "${python}" -m pip --disable-pip-version-check install --quiet --target "${fetched}" pip &&
        PYTHONPATH=${fetched} "${VENV}/bin/python" -m pip install --quiet --ignore-installed pip || status=$?
    rm -rf "${fetched}"
    return "${status}"
}

make_venv() {
    local python=$1
    "${python}" -m venv "${VENV}" >/dev/null 2>&1 && return
    rm -rf "${VENV}"
    "${python}" -m venv --without-pip "${VENV}" && install_pip "${python}" && return
    rm -rf "${VENV}"  # half of one would be taken for whole by the next call
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
    echo "environment: installing (several GB of downloads the first time, most of it PyTorch)"
    local pip=("${VENV}/bin/python" -m pip --disable-pip-version-check install)
    # && all along: a shell does not stop at errors in what stands before ||
    (
        cd "${PROJECT_DIR}" &&
            "${pip[@]}" -r requirements/lock.txt &&
            "${pip[@]}" --no-deps -r requirements/mm.txt &&
            { [[ ${with} != tests ]] || "${pip[@]}" -r requirements/tests.txt -r requirements/docs.txt; } &&
            "${pip[@]}" --quiet --no-deps --editable .
    ) || fail "the installation failed; the lines above say why. Run the same command again to go on."
    echo "${wanted}" >"${stamp}"
    [[ ${with} == tests ]] && echo "${wanted}" >"${VENV}/.linvis-run"
    return 0
}
