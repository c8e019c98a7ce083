#!/usr/bin/env bash
# From a fresh clone to trained networks in three tasks, on the pictures that come with the project:
#
#   bash tools/quickstart.sh [OPTIONS OF tools/quickstart.py]
#
# Makes .venv (see tools/environment.sh), then trains and tests VRWKV for classification, Mask R-CNN and UperNet.
# A second run reuses what is there; --fresh trains anew.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment
cd "${PROJECT_DIR}"
exec "${VENV}/bin/python" tools/quickstart.py "$@"
