# What the job scripts share; they source it with `home` set to the checkout.
# shellcheck shell=bash disable=SC2154
#
# A job ends in one of four ways:
#   the run finished            the job ends with it
#   Slurm wants the nodes back  the header's --signal: every rank saves, the job is requeued and goes
#   (time limit, preemption)    on from its checkpoint, with the same numbers
#   it failed                   launch/restarts.py decides: a disk that was full or a process that was
#                               lost is requeued, WIDEBATCH_RESTARTS times (3) without a newer
#                               checkpoint; a defect or a wrong setting never
#   a node died                 Slurm requeues by itself (--requeue), from the last checkpoint

say() { echo "[$(date +%FT%T)] $*"; }

has_setting() { # has_setting --out "$@": given as --out X or --out=X?
  local name=$1 argument
  shift
  for argument; do case $argument in "$name" | "$name="*) return 0 ;; esac done
  return 1
}

value_of() { # value_of --out "$@": its value, the last one if there are several
  local name=$1 value=''
  shift
  while [ $# -gt 0 ]; do
    case $1 in "$name") value=${2:-} ;; "$name="*) value=${1#*=} ;; esac
    shift
  done
  printf %s "$value"
}

job_state() { scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\) .*/\1/p'; }

requeue() {
  say "requeueing job $SLURM_JOB_ID to go on"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "Slurm does not requeue this job: submit it again and it goes on from the checkpoint"
    exit 75
  fi
  trap - USR1 TERM
  sleep 300 # Slurm ends this shell within seconds
  exit 1
}

pretrain() { # pretrain RECIPE [SETTING...]
  local recipe=$1 out endings verdict step status signalled=''
  shift
  local python=${WIDEBATCH_PYTHON:-$home/.venv/bin/python}
  [ -x "$python" ] || { say "no $python: run 'make setup' in $home, or set WIDEBATCH_PYTHON"; exit 2; }

  # DATA and DATA_TEST in the environment are another way to say --data.train and --data.test.
  if [ -n "${DATA:-}" ] && ! has_setting --data.train "$@"; then set -- --data.train "$DATA" "$@"; fi
  if [ -n "${DATA_TEST:-}" ] && ! has_setting --data.test "$@"; then set -- --data.test "$DATA_TEST" "$@"; fi
  # One folder per job name: the same sbatch line, submitted again, goes on with the same run.
  has_setting --out "$@" || set -- --out "runs/$SLURM_JOB_NAME" "$@"
  out=$(value_of --out "$@")
  mkdir -p "$(dirname "$out")"
  # Processes leave word there of how they ended: srun -K hides their exit codes.
  endings=$(cd "$(dirname "$out")" && pwd)/.$(basename "$out").endings-$SLURM_JOB_ID
  rm -rf "$endings"
  export WIDEBATCH_ENDINGS=$endings

  # Since Slurm 22.05 srun does not take this from the header by itself. Where the header has none,
  # the tasks share what the job has; one CPU each would be all that they may run on.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  fi
  export PYTHONUNBUFFERED=1
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, run folder $out"

  # -K: when one task dies, all end. Ranks, world size and the rendezvous address and port come from
  # Slurm's variables (launch/cluster.py); MASTER_ADDR and MASTER_PORT win where they are set.
  # -P: a folder called `launch` where the job was submitted is not ours.
  srun -K1 "$python" -P -m launch pretrain "$recipe" "$@" &
  step=$!
  # srun hands USR1 on to every task; a TERM would make it kill them instead.
  trap 'signalled=again; say "asked to stop"; kill -USR1 "$step" 2>/dev/null' USR1 TERM
  while true; do
    status=0
    wait "$step" || status=$?
    [ "$signalled" = again ] || break
    signalled=once # a trap ends `wait` early
  done

  local asked=()
  [ -z "$signalled" ] || asked=(--signalled)
  if ! verdict=$("$python" -P -m launch.restarts "$endings" --out "$out" --status "$status" "${asked[@]}"); then
    verdict=end # it has said why
  fi
  rm -rf "$endings"
  say "${verdict#*$'\n'}"
  # A cancelled job is no longer RUNNING, and stays ended.
  [ "${verdict%%$'\n'*}" = again ] && [ "$(job_state)" = RUNNING ] || exit "$status"
  requeue
}
