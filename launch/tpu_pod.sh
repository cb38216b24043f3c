#!/usr/bin/env bash
# A TPU slice of Google Cloud, through gcloud: asks for it, waits, installs,
# runs, and begins anew with another one where it is taken away.
#
#   NAME=paper ZONE=us-central1-a ACCELERATOR=v5litepod-16 \
#     WORKDIR=gs://bucket/runs/paper CONFIG=configs/birdie.py:paper \
#     launch/tpu_pod.sh --config.mesh.fsdp=8 --config.mesh.model=2 \
#     --config.accum=13
#
# What runs is the commit that is checked out. Ctrl-C and SIGTERM have the run
# save, and end it; the slice stays (and costs) until
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail

cd "$(dirname "$0")/.."
NAME=${NAME:-tetrad}
ZONE=${ZONE:?a zone that has such TPUs, such as us-central1-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}  # the kind's own; v6e: v2-alpha-tpuv6e
CAPACITY=${CAPACITY=--spot}              # or --reserved, or empty: on demand
PROJECT=${PROJECT:-birdie}               # birdie, udim, slimsam, thor
CONFIG=${CONFIG:-configs/$PROJECT.py}    # a file, and :VARIANTS
WORKDIR=${WORKDIR:?a folder in a bucket, such as gs://bucket/runs/paper}
DATA=${DATA:-}                           # gs://….tar that becomes /data
LOG=${LOG:-$NAME.log}
PAUSE=${PAUSE:-60}                       # a lost slice is shown for a while
POLL=${POLL:-30}

# shellcheck source-path=SCRIPTDIR source=policy.sh
source launch/policy.sh
commit=$(git rev-parse HEAD)
output=$(mktemp)
archive=$(mktemp)
trap 'rm -f "$output" "$archive"' EXIT

queued() {
  gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

on_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}

# up: returns when the slice is there.
up() {
  local state
  while [[ -z $stopped ]]; do
    state=$(gcloud compute tpus queued-resources list --zone="$ZONE" \
      --filter="name ~ /$NAME\$" --format="value(state.state)") || return
    case $state in
      ACTIVE) return ;;
      "")
        queued create --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
          --runtime-version="$RUNTIME" ${CAPACITY:+"$CAPACITY"} || return
        ;;
      FAILED | SUSPENDED) queued delete --force --quiet || return ;;
      *)
        echo "$NAME: $state" >&2
        pause "$POLL"
        ;;
    esac
  done
  return 1
}

# install: the commit, an environment and the data on every worker. A second
# time takes seconds. The image's own Python is too old.
install() {
  git archive --format=tar.gz --output="$archive" "$commit" || return
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:tetrad.tar.gz" \
    --zone="$ZONE" --worker=all || return
  # shellcheck disable=SC2016 # $HOME is the worker's
  on_workers 'set -e
    mkdir -p tetrad && tar -xzf tetrad.tar.gz -C tetrad && cd tetrad
    python3 -m pip install --quiet --user uv
    uv=$HOME/.local/bin/uv
    [ -d .venv ] || $uv venv --quiet --python 3.12
    $uv pip install --quiet -c constraints.txt \
      -e ".[tpu,gcs,tokenizers,translation,photographs,weights]"' || return
  if [[ -n $DATA ]]; then
    on_workers "set -eo pipefail
      [ ! -e /data/.complete ] || exit 0
      sudo mkdir -p /data && sudo chown \$USER /data
      gcloud storage cat $(printf %q "$DATA") | tar -xf - -C /data
      touch /data/.complete"
  fi
}

# attempt FLAG...: the run, from its last checkpoint; sets `status`.
attempt() {
  local pid
  began=$SECONDS
  status=1
  if ! up || ! install; then
    [[ -z $stopped ]] || status=143
    return 0
  fi
  began=$SECONDS
  : >"$output"
  {
    on_workers "$(printf '%q ' tetrad/launch/worker.sh "$NAME" \
      python -m "$PROJECT.main" --config="$CONFIG" --workdir="$WORKDIR" \
      --distributed "$@")" 2>&1 || echo "worker gcloud: exit status $?"
  } | tee -a "$LOG" "$output" &
  pid=$!
  while kill -s 0 "$pid" 2>/dev/null; do
    wait "$pid" || true # Ctrl-C ends the wait, and not what it waits for
  done
  # shellcheck disable=SC2046 # words are what is wanted
  status=$(cause $(sed -nE 's/.*worker [^ ]+: exit status ([0-9]+).*/\1/p' \
    "$output"))
}

stop() {
  stopped=$1
  on_workers "$(printf '%q ' tetrad/launch/worker.sh "$NAME" --signal TERM)" ||
    true # nothing runs yet
}

stopped=
trap 'stop 130' INT
trap 'stop 143' TERM

persist "$@"
