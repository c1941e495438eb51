#!/usr/bin/env bash
# A command with --executor ray on a Ray cluster that lives as long as the job.
#   sbatch --nodes=4 ray.sh batch --manifest manifests/run_extended.yaml --skip-completed
#SBATCH --job-name=topoqa_ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # this script runs there
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_ADDRESS=$first:$port
cores=${SLURM_CPUS_PER_TASK:-1}
export RAY_AUTH_MODE=token # other users of the nodes stay out; the token lies in the home directory, which the nodes share
ray get-auth-token --generate >/dev/null
trap 'kill $(jobs -p) 2>/dev/null' EXIT

srun --nodes=1 --ntasks=1 --nodelist="$first" ray start --head --port="$port" --num-cpus="$cores" --block &
if [[ $SLURM_NNODES -gt 1 ]]; then
    others=$((SLURM_NNODES - 1))
    srun --nodes="$others" --ntasks="$others" --exclude="$first" \
        ray start --address="$RAY_ADDRESS" --num-cpus="$cores" --block &
fi
expected=$((SLURM_NNODES > 1 ? 2 : 1)) # calls of srun
while true; do # a node that did not start would be waited for until the time of the job is up
    running=$(jobs -rp | wc -l)
    if [[ $(ray status 2>/dev/null | grep -c ' node_') -ge $SLURM_NNODES ]]; then break; fi
    if [[ $running -lt $expected ]]; then
        echo "topoqa: error: the Ray cluster of job $SLURM_JOB_ID: expected $SLURM_NNODES nodes, found one that did not start; see above, and submit again" >&2
        exit 1
    fi
    sleep 1
done

topoqa "$@" --executor ray &
driver=$!
trap 'kill -USR1 "$driver"' USR1 # B: has told this shell alone; the jobs are told by the driver
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # a signal ends the waiting, not the driver
    code=0
    wait "$driver" || code=$?
done
if [[ $code -eq 138 ]]; then # 128 + SIGUSR1: the time is up; with --skip-completed the next start does the rest
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
