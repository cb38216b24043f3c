# What a launcher does when a run has ended; the launchers source it.
#
#   0       done                          it ends
#   2, 130  bad configuration, Ctrl-C     it ends: the same would come again
#   143     stopped after saving          the same command goes on with the run;
#                                         stopped soon, after a pause
#   others  failed, killed, lost a peer   again, RESTARTS times in a row at most
#
# shellcheck shell=bash

RESTARTS=${RESTARTS:-3}
PAUSE=${PAUSE:-20}     # seconds before the first of them, twice that before …
STEADY=${STEADY:-3600} # a run that lasted so many seconds starts a new row
BRIEF=${BRIEF:-300}    # a run that was stopped sooner has hardly gone on

# forward: sets `forwarded`, the words that hand JAX_PLATFORMS and the variables
# named in FORWARD to a command on another host.
forward() {
  local name
  forwarded=(env)
  for name in JAX_PLATFORMS ${FORWARD:-}; do
    if [[ ! -v $name ]]; then
      echo "error: FORWARD names $name, which is not set" >&2
      exit 2
    fi
    forwarded+=("$name=${!name}")
  done
}

# cause STATUS...: what the statuses of a run's processes come to. A refused
# configuration counts before a failure, and that before those it has stopped.
cause() {
  local status found=0
  for status in "$@"; do
    case $status in
      0) ;;
      2 | 130)
        echo "$status"
        return
        ;;
      143) [[ $found != 0 ]] || found=143 ;;
      *) [[ $found != 0 && $found != 143 ]] || found=$status ;;
    esac
  done
  echo "$found"
}

# pause SECONDS: sleeps in a way that lets traps act at once, or at all: of a
# Ctrl-C bash would leave the handling to a sleep that it waits for.
pause() {
  sleep "$1" &
  wait "$!" || true
}

failures=0 stops=0 # in a row

# again STATUS SECONDS: whether a run that ended so is to be started again.
again() {
  case $1 in
    0 | 2 | 130) return 1 ;;
    143)
      # What stops it may do so at every start: no more often than that.
      stops=$(($2 < BRIEF ? stops + 1 : 0))
      echo "stopped after saving: the run goes on" >&2
      pause $((PAUSE * (stops < 15 ? stops : 15)))
      return 0
      ;;
  esac
  if (($2 >= STEADY)); then
    failures=0
  fi
  failures=$((failures + 1))
  if ((failures > RESTARTS)); then
    echo "status $1 after $RESTARTS restarts: giving up" >&2
    return 1
  fi
  echo "status $1: restart $failures of $RESTARTS" >&2
  pause $((PAUSE * failures))
}

# persist ARGUMENT...: calls `attempt`, which sets `began` and `status`, until one
# is the last, or the caller's traps have set `stopped`.
persist() {
  local began=0
  while true; do
    attempt "$@"
    if [[ -n $stopped && $status == 143 ]]; then
      status=$stopped
    fi
    [[ -z $stopped ]] || exit "$status"
    again "$status" $((SECONDS - began)) || exit "$status"
    [[ -z $stopped ]] || exit "$stopped"
  done
}

# slurm_again STATUS SECONDS: as `again`, but a run that has saved goes back into
# the queue, which ends this job; not after scancel, which leaves nothing running.
slurm_again() {
  if [[ $1 == 143 ]]; then
    if [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 143
  fi
  again "$@" || exit "$1"
}
