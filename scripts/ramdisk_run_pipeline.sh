#!/usr/bin/env bash
# The pipeline from disk and from memory: `topoqa ramdisk` with its options; what follows -- goes to the pipeline.
# Environment variables: those of run_full_pipeline.sh, and SAFE_RAMDISK_TEST_MODE=1. An option wins over a variable.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

ARGUMENTS=(ramdisk) # topoqa ramdisk reads GRAPH_DIR and SAFE_RAMDISK_TEST_MODE itself
if [ -n "$PIPELINE_MANIFEST" ]; then ARGUMENTS+=(--manifest "$PIPELINE_MANIFEST"); fi
if [ -n "$NUM_WORKERS_OVERRIDE" ]; then
    ARGUMENTS+=(--baseline-num-workers "$NUM_WORKERS_OVERRIDE" --ram-num-workers "$NUM_WORKERS_OVERRIDE")
fi
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    ARGUMENTS+=("$1")
    shift
done
ARGUMENTS+=(--)
add_pipeline_arguments
exec "$TOPOQA" "${ARGUMENTS[@]}" "${@:2}"
