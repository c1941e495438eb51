#!/usr/bin/env bash
# Phase 1 and phase 2 from the best run, or from --checkpoint and --run-dir: `topoqa fine-tune` with its options.
# Environment variables: GRAPH_DIR, TRAIN_LABELS, VAL_LABELS; without them the data of the run. An option wins over a variable.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

ARGUMENTS=(fine-tune)
if [ -n "$GRAPH_DIR" ]; then ARGUMENTS+=(-p graph_dir "$GRAPH_DIR"); fi
if [ -n "$TRAIN_LABELS" ]; then ARGUMENTS+=(-p train_labels "$TRAIN_LABELS"); fi
if [ -n "$VAL_LABELS" ]; then ARGUMENTS+=(-p val_labels "$VAL_LABELS"); fi
exec "$TOPOQA" "${ARGUMENTS[@]}" "$@"
