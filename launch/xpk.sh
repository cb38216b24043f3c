#!/usr/bin/env bash
# A cluster that xpk made (github.com/AI-Hypercomputer/xpk): one JobSet, its
# restarts included.
#
#   CLUSTER=mine TPU_TYPE=v5litepod-16 IMAGE=REGION-docker.pkg.dev/…/tetrad \
#     WORKDIR=gs://bucket/runs/a launch/xpk.sh --config.mesh.fsdp=8 \
#     --config.data.batch_size=16 --config.evaluation.batch_size=16
#
# IMAGE comes from Dockerfile; see README.md.
set -euo pipefail

cd "$(dirname "$0")/.."
CLUSTER=${CLUSTER:?the name of the cluster}
NAME=${NAME:-tetrad}                     # of the workload
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
SLICES=${SLICES:-1}
IMAGE=${IMAGE:?an image that Dockerfile made}
PROJECT=${PROJECT:-birdie}               # birdie, udim, slimsam, thor
CONFIG=${CONFIG:-configs/$PROJECT.py}    # a file, and :VARIANTS
WORKDIR=${WORKDIR:?gs://bucket/runs/a; slimsam: a disk that all hosts mount}
DATA=${DATA:-}                           # gs://….tar that becomes /data
# xpk counts all of them, so this is a number that preemptions do not reach.
RESTARTS=${RESTARTS:-100}

# An image for Python has no gcloud; fsspec comes with the extra `gcs`.
data=
if [[ -n $DATA ]]; then
  cat="import shutil, sys, fsspec; "
  cat+="shutil.copyfileobj(fsspec.open(sys.argv[1]).open(), sys.stdout.buffer)"
  data="set -eo pipefail; mkdir -p /data; "
  data+="$(printf '%q ' python -c "$cat" "$DATA")| tar -xf - -C /data; "
fi

command=(python -m "$PROJECT.main" --config="$CONFIG" --workdir="$WORKDIR"
  --distributed "$@")

# Of itself xpk starts again after 42 and 127-255: 143, and deaths by a signal.
# JAX_PLATFORMS: where the TPUs are missing the run fails, no CPU stands in.
# `exec`, since it passes SIGTERM to what it has started and no further.
xpk workload create \
  --cluster="$CLUSTER" \
  --workload="$NAME" \
  --tpu-type="$TPU_TYPE" \
  --num-slices="$SLICES" \
  --docker-image="$IMAGE" \
  --max-restarts="$RESTARTS" \
  --restart-on-exit-codes=1 \
  --termination-grace-period-seconds=300 \
  --command="${data}exec env JAX_PLATFORMS=tpu $(printf '%q ' "${command[@]}")"
