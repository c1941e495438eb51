#!/usr/bin/env bash
# The core sweep: `topoqa batch` on run_core.yaml, with its options.
# Environment variables: GRAPH_DIR, TRAIN_LABELS, VAL_LABELS. An option wins over a variable.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

ARGUMENTS=(batch --manifest manifests/run_core.yaml)
add_data_overrides
exec "$TOPOQA" "${ARGUMENTS[@]}" "$@"
