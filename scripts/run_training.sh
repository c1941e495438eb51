#!/usr/bin/env bash
# One training: `topoqa run` with its options; without --config it takes config.yaml.
# Environment variables: GRAPH_DIR, TRAIN_LABELS, VAL_LABELS. An option wins over a variable.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

ARGUMENTS=(run)
case " $* " in
    *" --config "* | *" --config="* | *" --help "*) ;;
    *) ARGUMENTS+=(--config config.yaml) ;;
esac
add_data_overrides
exec "$TOPOQA" "${ARGUMENTS[@]}" "$@"
