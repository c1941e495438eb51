#!/usr/bin/env bash
# Sweep, phase 1, phase 2: `topoqa pipeline` with its options, such as --manifest. Environment variables:
# SKIP_SWEEP=1, SKIP_FINE=1, RESUME_FROM, GRAPH_DIR, PIPELINE_MANIFEST, NUM_WORKERS_OVERRIDE, TRAIN_LABELS, VAL_LABELS.
# An option wins over a variable.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

ARGUMENTS=(pipeline)
if [ -n "$GRAPH_DIR" ]; then ARGUMENTS+=(--graph-dir "$GRAPH_DIR"); fi
if [ -n "$PIPELINE_MANIFEST" ]; then ARGUMENTS+=(--manifest "$PIPELINE_MANIFEST"); fi
if [ -n "$NUM_WORKERS_OVERRIDE" ]; then ARGUMENTS+=(--num-workers "$NUM_WORKERS_OVERRIDE"); fi
add_pipeline_arguments
exec "$TOPOQA" "${ARGUMENTS[@]}" "$@"
