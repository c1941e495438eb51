#!/usr/bin/env bash
# A training that goes on where it stopped when its time is up or its node is wanted by somebody else.
#   one:    sbatch run.sh NAME --config config.yaml --override paths.graph=/shared/build/graph_data
#   many:   sbatch --array=1-9 run.sh trainings.txt        each line: NAME and what follows it
#   ranks:  sbatch --nodes=2 run.sh NAME --config config.yaml --override trainer.num_nodes=2 --override trainer.strategy=ddp
# RUN_ROOT is the run root, on storage that all nodes share.
#SBATCH --job-name=topoqa
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    read -ra words < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
    set -- "${words[@]}"
fi

root=${RUN_ROOT:-training_runs}
run=$root/$1
if [[ -e $run/run_metadata.json ]]; then # --force: Slurm has ended what ran on another node before
    command=(topoqa resume --run-dir "$run" --checkpoint last --force)
else
    command=(topoqa run --run-root "$root" --run-name "$1" "${@:2}")
fi

if [[ ${SLURM_NNODES:-1} -gt 1 ]]; then # where the ranks of one training meet
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
fi

srun "${command[@]}"
code=$?
# 128 + SIGUSR1: the time is up. A run without a checkpoint would get no further the next time.
if [[ $code -eq 138 && -e $run/model_checkpoints/last.chkpt ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
