#!/usr/bin/env bash
# Phase 1 and phase 2 from the best run, or from --checkpoint and --run-dir: `topoqa fine-tune` with its options.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

exec "$TOPOQA" fine-tune "$@"
