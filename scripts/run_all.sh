#!/usr/bin/env bash
# The core sweep: `topoqa batch` on run_core.yaml, with its options.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

exec "$TOPOQA" batch --manifest manifests/run_core.yaml "$@"
