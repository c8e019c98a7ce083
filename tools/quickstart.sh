#!/usr/bin/env bash
# From a fresh clone to trained networks in three tasks, on the pictures that come with the project:
#
#   bash tools/quickstart.sh [OPTIONS OF tools/quickstart.py]
#
# Makes .venv (see tools/environment.sh), then trains and tests a backbone (--backbone, VRWKV by default) for
# classification, with Mask R-CNN and with UperNet.
# A second run reuses what is there; --fresh trains anew.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
for argument in "$@"; do
    if [[ ${argument} == -h || ${argument} == --help ]]; then  # nothing is installed to say this
        python=$(find_python) || fail "Python 3.10 to 3.13 is needed; set PYTHON=/path/to/python."
        exec "${python}" "${PROJECT_DIR}/tools/quickstart.py" --help
    fi
done
ensure_environment
cd "${PROJECT_DIR}"
exec "${VENV}/bin/python" tools/quickstart.py "$@"
