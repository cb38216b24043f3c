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
# What is written here is killed, so nobody else may write. A home may be that of
# several hosts.
folder=$HOME/.cache/tetrad/workers
pid_file=$folder/$HOSTNAME-$name.pid
mkdir -p "$folder"
if [[ -L $folder || ! -O $folder ]]; then
  echo "error: $folder is a link, or not yours: remove it" >&2
  exit 2
fi
chmod 700 "$folder"

# look PID: sets `began` to when a process has begun, in the kernel's ticks; to
# nothing, if it is not there or dead.
look() {
  local line words
  began=
  read -r line 2>/dev/null <"/proc/$1/stat" || return 0
  read -ra words <<<"${line##*) }" # its name comes before, and may have blanks
  [[ ${words[0]:-Z} == Z ]] || began=${words[19]}
}

# The process of that name, if it is there: numbers of processes come again.
running() {
  local pid since
  read -r pid since 2>/dev/null <"$pid_file" || return 1
  look "$pid"
  [[ -n $began && $began == "$since" ]] && echo "$pid"
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
look "$pid"
echo "$pid $began" >"$pid_file"
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
