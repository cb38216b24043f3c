#!/usr/bin/env bash
# One process of a run on this host; ssh.sh and tpu_pod.sh call it.
#
#   launch/worker.sh NAME COMMAND...      ends what a lost launcher has left
#                                         running, then runs the command
#   launch/worker.sh NAME --signal TERM   signals what runs
#
# The last line says how it went: `worker NAME: exit status N`.
set -euo pipefail

name=$1
shift
pid_file=${TMPDIR:-/tmp}/$name.pid

# The process of that name, if it is there: numbers of processes come again.
running() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) || return 1
  grep -qs '\.main' "/proc/$pid/cmdline" && echo "$pid"
}

if [[ $1 == --signal ]]; then
  if pid=$(running); then
    kill -s "$2" "$pid" || true
  fi
  exit
fi

cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
while pid=$(running); do
  kill -s KILL "$pid" || true
  sleep 0.2
done

"$@" &
pid=$!
echo "$pid" >"$pid_file"
signalled=false
trap 'signalled=true; kill -s TERM "$pid" 2>/dev/null || true' HUP INT TERM
while true; do
  signalled=false
  status=0
  wait "$pid" || status=$?
  # A signal ends the wait, not the process.
  if ! $signalled || ! kill -s 0 "$pid" 2>/dev/null; then
    break
  fi
done
rm -f "$pid_file"
echo "worker $name: exit status $status"
exit "$status"
