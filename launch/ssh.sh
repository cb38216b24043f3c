#!/usr/bin/env bash
# Hosts that ssh reaches: a process a host, with all of its devices; here 4 a
# host.
#
#   HOSTS="a b" WORKDIR=/shared/runs/a launch/ssh.sh --config.mesh.fsdp=8
#
# Each host has the repository and its .venv in the same folder, and sees
# WORKDIR. Where one process fails the others end too, and all start again; see
# policy.sh. Ctrl-C, SIGTERM and a terminal that is closed have the run save, and
# end it: with `nohup`, or in tmux, it stays.
set -euo pipefail

cd "$(dirname "$0")/.."
read -ra hosts <<<"${HOSTS:?names of hosts; the first is where they meet}"
PROJECT=${PROJECT:-birdie}               # birdie, udim, slimsam, thor
CONFIG=${CONFIG:-configs/$PROJECT.py}    # a file, and :VARIANTS
WORKDIR=${WORKDIR:-$PWD/runs/$PROJECT}   # seen by all hosts
DIR=${DIR:-$PWD}                         # the repository on each host
COORDINATOR=${COORDINATOR:-${hosts[0]#*@}:8476} # as all hosts reach the first
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda} # where missing, no CPU stands in
FORWARD=${FORWARD:-}                     # names of variables for the hosts
GRACE=${GRACE:-10}                       # seconds to end by oneself
POLL=${POLL:-1}

# shellcheck source-path=SCRIPTDIR source=policy.sh
source launch/policy.sh
forward
# A connection that is lost counts as a failure, after a minute.
options=(-n -o BatchMode=yes -o ConnectTimeout=10
  -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
name=tetrad-$(cksum <<<"$WORKDIR" | cut -d " " -f 1)
statuses=$(mktemp -d)
trap 'rm -rf "$statuses"' EXIT

# on_host I ARGUMENT...: worker.sh with these arguments on the host of number I.
on_host() {
  local i=$1
  shift
  # shellcheck disable=SC2029 # it is quoted for the other side
  ssh "${options[@]}" "${hosts[i]}" \
    "$(printf '%q ' "$DIR/launch/worker.sh" "$name-$i" "$@")"
}

signal_all() {
  local i pids=()
  for i in "${!hosts[@]}"; do
    on_host "$i" --signal "$1" &
    pids+=("$!")
  done
  wait "${pids[@]}" || true
}

# process I FLAG...: one process of the run; leaves its status in a file.
process() {
  local i=$1 status=0
  shift
  on_host "$i" "${forwarded[@]}" \
    python -m "$PROJECT.main" --config="$CONFIG" --workdir="$WORKDIR" \
    --coordinator="$COORDINATOR" --num_processes="${#hosts[@]}" \
    --process_id="$i" "$@" || status=$?
  echo "$status" >"$statuses/$i"
}

# verdict: sets `status`, of the processes that have ended, and how many have.
verdict() {
  local ended
  mapfile -t ended < <(cat "$statuses"/* 2>/dev/null)
  status=$(cause "${ended[@]}")
  over=${#ended[@]}
}

# attempt FLAG...: the run, from its last checkpoint; sets `status`.
attempt() {
  local i found=
  began=$SECONDS
  rm -f "$statuses"/*
  for i in "${!hosts[@]}"; do
    process "$i" "$@" &
  done
  while true; do
    pause "$POLL"
    verdict
    if ((over == ${#hosts[@]})); then
      break
    fi
    if [[ -n $found ]]; then
      signal_all KILL
    elif [[ $status != 0 && $status != 143 ]]; then
      # jax would notice after 100 seconds, and before it has begun after 300.
      pause "$GRACE"
      verdict
      found=$status
    fi
  done
  status=${found:-$status} # not of those that it has killed
}

stopped=
trap 'stopped=130; signal_all TERM' INT
trap 'stopped=143; signal_all TERM' HUP TERM

persist "$@"
