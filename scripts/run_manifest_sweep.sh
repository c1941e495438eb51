#!/usr/bin/env bash
# A sweep: run_manifest_sweep.sh [--bundle core|extended|experiments] [--manifest FILE] [--fast-dev] [-- BATCH ARGUMENTS]
# --manifest wins over --bundle; what follows -- goes to `topoqa batch` as it is, and wins over a variable.
# Environment variables: GRAPH_DIR, TRAIN_LABELS, VAL_LABELS.
set -e
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

usage="[--bundle core|extended|experiments] [--manifest FILE] [--fast-dev] [-- BATCH ARGUMENTS]"
bundle=core
manifest=
ARGUMENTS=()
while [ $# -gt 0 ]; do
    case $1 in
        --bundle | --manifest) [ $# -gt 1 ] || fail "$1: expected a value, found none; write it after the option" ;;
    esac
    case $1 in
        --bundle) bundle=$2 && shift ;;
        --bundle=*) bundle=${1#*=} ;;
        --manifest) manifest=$2 && shift ;;
        --manifest=*) manifest=${1#*=} ;;
        --fast-dev) ARGUMENTS+=(--override fast_dev_run=true) ;;
        -h | --help) echo "$(basename -- "$0") $usage" && exit ;;
        --) shift && break ;;
        *) fail "$1: expected $usage, found an unknown argument; write arguments of topoqa batch after --" ;;
    esac
    shift
done
case $bundle in
    core | extended | experiments) ;;
    *) fail "--bundle: expected core, extended or experiments, found $bundle; or name a file with --manifest" ;;
esac
ARGUMENTS=(batch --manifest "${manifest:-manifests/run_$bundle.yaml}" "${ARGUMENTS[@]+"${ARGUMENTS[@]}"}")
add_data_overrides
exec "$TOPOQA" "${ARGUMENTS[@]}" "$@"
