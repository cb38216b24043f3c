#!/usr/bin/env bash
# Several nodes under SLURM: a process for every GPU, which is how jax deals
# them out among the tasks that srun starts.
#
#   PROJECT=birdie WORKDIR=/shared/runs/a \
#     sbatch --nodes=4 launch/slurm_nodes.sh --config.mesh.fsdp=8 \
#     --config.data.batch_size=128 --config.evaluation.batch_size=128
#
# Nodes with 4 GPUs: --ntasks-per-node=4 --gpus-per-node=4 before the script.
# To be submitted from the repository's folder, which all nodes see, as they see
# WORKDIR; the job's output goes there too.
#
#SBATCH --job-name=tetrad
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Five minutes before its time is up the step, not this script, gets SIGTERM:
# the run saves and leaves with 143.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

: "${SLURM_JOB_ID:?submit this file with sbatch}"
PROJECT=${PROJECT:-birdie}                     # birdie, udim, slimsam, thor
CONFIG=${CONFIG:-configs/$PROJECT.py}          # a file, and :VARIANTS
WORKDIR=${WORKDIR:-runs/$PROJECT-$SLURM_JOB_ID} # the same after a requeue
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}    # where missing, no CPU stands in

cd "$SLURM_SUBMIT_DIR"
# shellcheck source-path=SCRIPTDIR source=policy.sh
source launch/policy.sh
PATH="$PWD/.venv/bin:$PATH"
trap : TERM # when the job has to go: the step ends, and then this script
statuses=$PWD/.statuses-$SLURM_JOB_ID

# Process 0 runs here, on the first node, and listens for the others: on the
# address that they are given, where jax itself would take all of the node's.
# The port is the one that jax would take.
: "${JAX_COORDINATOR_ADDRESS:=$SLURMD_NODENAME:$((61440 + SLURM_JOB_ID % 4096))}"
export JAX_COORDINATOR_ADDRESS
host=${JAX_COORDINATOR_ADDRESS%:*}
if getent ahosts "$host" | grep -E '^(127\.|::1 )' >/dev/null &&
  ((SLURM_JOB_NUM_NODES > 1)); then
  echo "$host is a loopback address on $SLURMD_NODENAME: process 0 listens on" \
    "all addresses, unless JAX_COORDINATOR_BIND_ADDRESS names one" >&2
else
  : "${JAX_COORDINATOR_BIND_ADDRESS:=$JAX_COORDINATOR_ADDRESS}"
  export JAX_COORDINATOR_BIND_ADDRESS
fi

# A task that fails ends the others; srun then returns the highest status, which
# is that of the others. So each task leaves its own.
# shellcheck disable=SC2016 # it is expanded in the task
task='
  trap : TERM
  status=0
  "${@:2}" || status=$?
  echo "$status" >"$1/$SLURM_PROCID"
  [[ $status != 143 ]] || status=0  # the others are saving: they have time
  exit "$status"
'

while true; do
  began=$SECONDS
  status=0
  mkdir -p "$statuses"
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c "$task" task "$statuses" \
    python -m "$PROJECT.main" --config="$CONFIG" --workdir="$WORKDIR" \
    --distributed "$@" || status=$?
  # shellcheck disable=SC2046 # words are what is wanted
  status=$(cause "$status" $(cat "$statuses"/* 2>/dev/null))
  rm -rf "$statuses"
  slurm_again "$status" $((SECONDS - began))
done
