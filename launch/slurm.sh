#!/usr/bin/env bash
# One node under SLURM: one process with all of the node's GPUs.
#
#   PROJECT=thor sbatch --gpus-per-node=8 launch/slurm.sh --config.seed=1
#
# To be submitted from the repository's folder, where the job's output goes too.
#
#SBATCH --job-name=tetrad
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
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

while true; do
  began=$SECONDS
  status=0
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    python -m "$PROJECT.main" --config="$CONFIG" --workdir="$WORKDIR" "$@" ||
    status=$?
  slurm_again "$status" $((SECONDS - began))
done
