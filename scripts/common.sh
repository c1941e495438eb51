# shellcheck shell=bash
# Sourced by the scripts beside it: where topoqa is, one-line mistakes, and the pipeline's environment variables.

fail() {
    echo "$(basename -- "$0"): error: $*" >&2
    exit 2
}

TOPOQA=$(command -v topoqa) || TOPOQA=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.venv/bin/topoqa
[ -x "$TOPOQA" ] || fail "topoqa: expected on the path or in the repository's .venv, found in neither;" \
    "run make test once, or activate the environment that has it"

# on NAME: whether that variable is switched on.
on() {
    case ${!1:-0} in
        1 | true | yes) return 0 ;;
        0 | false | no) return 1 ;;
        *) fail "$1: expected 1 or 0, found ${!1}; set one of them, or unset it" ;;
    esac
}

# What SKIP_SWEEP, SKIP_FINE, RESUME_FROM, TRAIN_LABELS and VAL_LABELS ask of a pipeline is added to the array ARGUMENTS.
add_pipeline_arguments() {
    if on SKIP_SWEEP; then ARGUMENTS+=(--skip-sweep); fi
    if on SKIP_FINE; then ARGUMENTS+=(--skip-fine); fi
    if [ -n "$RESUME_FROM" ]; then ARGUMENTS+=(--resume-from "$RESUME_FROM"); fi
    if [ -n "$TRAIN_LABELS" ]; then ARGUMENTS+=(--train-labels "$TRAIN_LABELS"); fi
    if [ -n "$VAL_LABELS" ]; then ARGUMENTS+=(--val-labels "$VAL_LABELS"); fi
}

# What GRAPH_DIR, TRAIN_LABELS and VAL_LABELS ask of runs is added to the array ARGUMENTS, as overrides of the configuration.
add_data_overrides() {
    if [ -n "$GRAPH_DIR" ]; then ARGUMENTS+=(--override "paths.graph=$GRAPH_DIR"); fi
    if [ -n "$TRAIN_LABELS" ]; then ARGUMENTS+=(--override "paths.train_labels=$TRAIN_LABELS"); fi
    if [ -n "$VAL_LABELS" ]; then ARGUMENTS+=(--override "paths.val_labels=$VAL_LABELS"); fi
}
