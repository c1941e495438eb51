#!/usr/bin/env bash
# One training: `topoqa run` with its options; without --config it takes config.yaml.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

case " $* " in
    *" --config "* | *" --config="* | *" --help "*) exec "$TOPOQA" run "$@" ;;
    *) exec "$TOPOQA" run --config config.yaml "$@" ;;
esac
