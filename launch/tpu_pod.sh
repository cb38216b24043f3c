#!/usr/bin/env bash
# A TPU slice of Google Cloud, through gcloud: asks for it, waits, installs,
# runs, and begins anew with another one where it is taken away.
#
#   NAME=a ZONE=us-central1-a ACCELERATOR=v5litepod-16 \
#     WORKDIR=gs://bucket/runs/a launch/tpu_pod.sh --config.mesh.fsdp=8 \
#     --config.data.batch_size=16 --config.evaluation.batch_size=16
#
# What runs is the commit that is checked out. Ctrl-C, SIGTERM and a terminal
# that is closed have the run save, and end it: with `nohup`, or in tmux, it
# stays. However it ends, the slice stays and costs, unless DELETE is set.
set -euo pipefail

cd "$(dirname "$0")/.."
NAME=${NAME:-tetrad}
ZONE=${ZONE:?a zone that has such TPUs, such as us-central1-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}  # the kind's own; v6e: v2-alpha-tpuv6e
CAPACITY=${CAPACITY=--spot}              # or --reserved, or empty: on demand
PROJECT=${PROJECT:-birdie}               # birdie, udim, slimsam, thor
CONFIG=${CONFIG:-configs/$PROJECT.py}    # a file, and :VARIANTS
WORKDIR=${WORKDIR:?gs://bucket/runs/a; slimsam: a disk that all hosts mount}
DATA=${DATA:-}                           # gs://….tar that becomes /data
DELETE=${DELETE:-}                       # yes: the slice goes when the run ends
CREATE_FLAGS=${CREATE_FLAGS:-}           # of `queued-resources create`, such as
                                         # --service-account=… --network=…
SSH_FLAGS=${SSH_FLAGS:-}                 # such as --tunnel-through-iap
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu}
FORWARD=${FORWARD:-}                     # names of variables for the hosts
LOG=${LOG:-$NAME.log}
PAUSE=${PAUSE:-60}                       # a lost slice is shown for a while
POLL=${POLL:-30}

# shellcheck source-path=SCRIPTDIR source=policy.sh
source launch/policy.sh
forward
read -ra create_flags <<<"$CREATE_FLAGS"
read -ra ssh_flags <<<"$SSH_FLAGS"
commit=$(git rev-parse HEAD)
output=$(mktemp)
archive=$(mktemp)
requested=
trap finish EXIT

queued() {
  gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

on_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --quiet "${ssh_flags[@]}" --command="$1"
}

finish() {
  rm -f "$output" "$archive"
  if [[ -n $DELETE && -n $requested ]]; then
    queued delete --force --quiet || true
  elif [[ -n $requested ]]; then
    echo "$NAME stays, and costs, until: gcloud compute tpus" \
      "queued-resources delete $NAME --zone=$ZONE --force" >&2
  fi
}

# up: returns when the slice is there. One that was taken away is asked for
# again; a request that has failed says why, and counts as a failure.
up() {
  local state
  requested=yes
  while [[ -z $stopped ]]; do
    state=$(gcloud compute tpus queued-resources list --zone="$ZONE" \
      --filter="name ~ /$NAME\$" --format="value(state.state)") || return
    case $state in
      ACTIVE) return ;;
      "")
        queued create --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
          --runtime-version="$RUNTIME" ${CAPACITY:+"$CAPACITY"} \
          "${create_flags[@]}" || return
        ;;
      SUSPENDED) queued delete --force --quiet || return ;;
      FAILED)
        echo "$NAME: FAILED: $(queued describe \
          --format="value(state.failedData.error.message)")" >&2
        queued delete --force --quiet || return
        return 1
        ;;
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
    --zone="$ZONE" --worker=all --quiet "${ssh_flags[@]}" || return
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
      "${forwarded[@]}" python -m "$PROJECT.main" --config="$CONFIG" \
      --workdir="$WORKDIR" --distributed "$@")" 2>&1 ||
      echo "worker gcloud: exit status $?"
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
trap 'stop 143' HUP TERM

persist "$@"
