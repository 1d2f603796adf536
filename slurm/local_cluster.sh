#!/usr/bin/env bash
# A real Slurm cluster on this one machine, in seconds: to try job scripts on, and for the tests.
#
#   slurm/local_cluster.sh up [--install] [--nodes 4] [--cpus 96] [--gpus 8] [--mode netns|local] [--bind]
#   slurm/local_cluster.sh down | status
#   slurm/local_cluster.sh node-off N | node-on N      cut a node's power, give it back
#
# One slurmctld and as many slurmd as --nodes, from Debian's packages (--install gets them).
# `up` prints what to export; then sbatch, squeue and scontrol work as on a large cluster:
#
#   eval "$(slurm/local_cluster.sh up)"; sbatch --nodes 2 slurm/simclr_cifar10.sh
#
# --mode netns  each node has its own network, host name, processes and /dev/shm, so that it can fail
#               like a machine. Needs root; the default where it is allowed.
# --mode local  all nodes share this machine's address, as any user.
# --bind        Slurm binds tasks to CPUs, as most clusters do (task/affinity): each process sees a set
#               of its own, of CPUs that are pretended (pretended_cpus.c).
# CPUs and GPUs are numbers to schedule with, not to compute on: there may be more than this machine
# has. Everything lives in WIDEBATCH_CLUSTER (default: a folder in TMPDIR); two folders, two clusters.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
self=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
export WIDEBATCH_CLUSTER=${WIDEBATCH_CLUSTER:-${TMPDIR:-/tmp}/widebatch-slurm-$(id -u)}
dir=$WIDEBATCH_CLUSTER
export SLURM_CONF=$dir/slurm.conf
# Ports, addresses and interface names follow from a number, so that clusters do not meet.
# 198.18.0.0/15 is set aside for test networks (RFC 2544): no real host is there.
settle() {
  number=$1 port=$((7000 + $1 * 100)) net=198.18.$1 bridge=wbslurm$1
}
settle "$(cat "$dir/run/number" 2>/dev/null || echo $(($(printf %s "$dir" | cksum | cut -d ' ' -f 1) % 250 + 1)))"
nodes=4 cpus=96 gpus=8 mode='' bind='' install=

die() {
  printf 'local_cluster: %s\n' "$@" >&2
  exit 1
}

# ---- processes -------------------------------------------------------------------------------

state() { grep -s '^State:' "/proc/$1/status" || echo 'State: gone'; }
is_dead() { [[ $(state "$1") != State:?[^ZXg]* ]]; } # `kill -0` takes a zombie for alive
alive() { # the process of a pid file, if the number is not somebody else's by now
  local pid=
  [ -r "$1" ] && read -r pid <"$1" && ! is_dead "$pid" &&
    grep -qzxs "WIDEBATCH_DAEMON=$dir" "/proc/$pid/environ"
}
our_processes() { # pid and name of each
  local proc pid
  {
    grep -lzxs "WIDEBATCH_DAEMON=$dir" /proc/[0-9]*/environ
    # Tasks of jobs: in local mode they outlive slurmd.
    grep -lzxs "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | xargs -r grep -lzs '^SLURM_TASK_PID='
    # slurmstepd overwrites its environment; the files it holds tell.
    for pid in $(pgrep -x slurmstepd); do
      find "/proc/$pid/fd" -lname "$dir/*" 2>/dev/null | head -n 1
    done
  } | cut -d / -f 3 | sort -u | while read -r pid; do
    read -r proc <"/proc/$pid/comm" && echo "$pid $proc"
  done 2>/dev/null || true # other users' processes cannot be read
}
end() { # end SIGNAL PID...: and wait; KILL for what is left after 3 s
  local signal=$1 pid left
  shift
  [ $# -gt 0 ] || return 0
  kill "-$signal" "$@" 2>/dev/null || true
  for _ in $(seq 60); do
    left=()
    for pid; do is_dead "$pid" || left+=("$pid"); done
    [ ${#left[@]} -gt 0 ] || return 0
    sleep 0.05
  done
  kill -KILL "${left[@]}" 2>/dev/null || true
  sleep 0.2
}
daemon() { env WIDEBATCH_DAEMON="$dir" "$@" </dev/null >>"$dir/log/daemons.log" 2>&1; }

# ---- nodes -----------------------------------------------------------------------------------

node_address() { if [ "$mode" = netns ]; then echo "$net.$((10 + $1)) $((port + 1))"; else echo "127.0.0.1 $((port + $1))"; fi; }

pretended_cpus() { # pretended_cpus NODE: variables for its processes
  [ -n "$bind" ] || return 0
  echo "LD_PRELOAD=$dir/run/pretended_cpus.so"
  echo "PRETENDED_CPUS=$cpus"
  echo "PRETENDED_CPUS_IN=$dir/run/cpus/$1"
}

node_on() {
  local node=$1 init='' parent pretended
  readarray -t pretended < <(pretended_cpus "node$node")
  [ -z "$bind" ] || pretended+=("HWLOC_SYNTHETIC=core:$cpus pu:1") # what slurmd takes the node for
  if [ "$mode" = local ]; then
    daemon "${pretended[@]}" slurmd -N "node$node"
    return
  fi
  ip link del "wb${number}n$node" 2>/dev/null || true
  rm -f "$dir/run/unshare.$node"
  # The first process of the node's own pid namespace is its power switch: with it all of it dies.
  # shellcheck disable=SC2016  # expanded inside
  WIDEBATCH_DAEMON=$dir setsid bash -c 'echo $$ >"$0"; exec "$@"' "$dir/run/unshare.$node" \
    unshare --net --uts --mount --pid --ipc --fork --mount-proc --kill-child \
    env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" WIDEBATCH_DAEMON="$dir" "${pretended[@]}" bash -c '
      trap : TERM INT
      hostname "$1"
      mount --bind "$3/hosts" /etc/hosts
      mount --bind "$3/nsswitch.conf" /etc/nsswitch.conf
      mount -t tmpfs -o mode=1777 shm /dev/shm
      ip link set lo up
      until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
      ip addr add "$2/24" dev eth0
      ip link set eth0 up
      slurmd -D -N "$1" &
      while :; do wait; sleep 0.2; done # reaps orphans, and outlives a crashed slurmd
    ' node-init "node$node" "$net.$((10 + node))" "$dir/etc" </dev/null >>"$dir/log/daemons.log" 2>&1 &
  for _ in $(seq 250); do
    parent=$(cat "$dir/run/unshare.$node" 2>/dev/null || true)
    init=$(cat "/proc/${parent:-none}/task/${parent:-none}/children" 2>/dev/null || true)
    init=${init%% *}
    [ -z "$init" ] || [ "$(readlink "/proc/$init/ns/net")" = "$(readlink /proc/self/ns/net)" ] || break
    sleep 0.02
  done
  [ -n "$init" ] || die "node$node did not start; see $dir/log/daemons.log"
  echo "$init" >"$(pid_file "$node")"
  ip link add "wb${number}n$node" type veth peer name eth0 netns "$init"
  ip link set "wb${number}n$node" master "$bridge" up
}

# A slurmd in a pid namespace writes a pid that means nothing outside: there the node's first process
# is the one to look at.
pid_file() {
  if [ "$mode" = netns ]; then echo "$dir/run/init.node$1.pid"; else echo "$dir/run/slurmd.node$1.pid"; fi
}

node_off() { # like a pulled plug: nothing on the node gets a chance to say goodbye
  local pid proc
  pid=$(pid_file "$1")
  if [ "$mode" = local ]; then
    our_processes | while read -r proc _; do
      ! grep -qzxs "SLURMD_NODENAME=node$1" "/proc/$proc/environ" || kill -KILL "$proc" 2>/dev/null || true
    done
  fi
  ! alive "$pid" || end KILL "$(cat "$pid")"
  rm -f "$pid"
}

# ---- the cluster -----------------------------------------------------------------------------

count() { timeout 5 sinfo -h -r -p main -t "$1" -o %D 2>/dev/null | awk '{ n += $1 } END { print n + 0 }'; }
wait_for_nodes() { # wait_for_nodes SECONDS
  for _ in $(seq $(($1 * 10))); do
    [ "$(count idle,mix,alloc,comp)" != "$nodes" ] || return 0
    sleep 0.1
  done
  sinfo -N -l >&2 || true
  tail -n 5 "$dir"/log/*.log >&2
  down >/dev/null
  die "not all of the $nodes nodes came up within $1 s; the logs are in $dir/log"
}
healthy() {
  local node
  alive "$dir/run/munged.pid" && alive "$dir/run/slurmctld.pid" || return 1
  for node in $(seq "$nodes"); do alive "$(pid_file "$node")" || return 1; done
  [ "$(count idle,mix,alloc,comp)" = "$nodes" ]
}
shape() { echo "$mode $nodes $cpus $gpus $bind"; }
read_shape() { [ -r "$dir/run/shape" ] && read -r mode nodes cpus gpus bind <"$dir/run/shape"; }
exports() {
  echo "export SLURM_CONF=$SLURM_CONF"
  # Nodes that share an address have names that resolve nowhere.
  [ "$mode" = netns ] || echo "export MASTER_ADDR=127.0.0.1"
}
may_unshare() {
  [ "$(id -u)" = 0 ] && unshare --net --uts --mount --pid --ipc --fork --mount-proc true 2>/dev/null &&
    ip link add "${bridge}t" type bridge 2>/dev/null && ip link del "${bridge}t"
}

need_programs() {
  local missing=''
  command -v slurmctld >/dev/null || missing+=' slurmctld'
  command -v slurmd >/dev/null || missing+=' slurmd'
  command -v sbatch >/dev/null || missing+=' slurm-client'
  command -v munged >/dev/null || missing+=' munge'
  command -v ip >/dev/null || missing+=' iproute2'
  [ -z "$bind" ] || command -v cc >/dev/null || missing+=' gcc libc6-dev'
  [ -n "$missing" ] || return 0
  [ -z "$install" ] || { "$(dirname "$self")/../launch/setup.sh" slurm >&2 && return; }
  die "missing:$missing. Install them as root (or: $self up --install):" \
    "    apt-get install -y --no-install-recommends$missing"
}

pretend_gpus() { # Slurm wants a device file for each: copies of /dev/null, else terminals nobody opens
  local gpu last=$((gpus - 1))
  for gpu in $(seq 0 "$last"); do
    mknod "$dir/etc/gpu$gpu" c 1 3 2>/dev/null && continue
    [ -c "/dev/tty$last" ] || die "this user cannot make $gpus pretend GPUs here: add --gpus 0"
    echo "/dev/tty[0-$last]"
    return
  done
  echo "$dir/etc/gpu[0-$last]"
}

prepare_binding() { # what a node's pretended CPUs need, and a task to see those it is bound to
  [ -n "$bind" ] || return 0
  cc -shared -fPIC -O1 -o "$dir/run/pretended_cpus.so" "$(dirname "$self")/pretended_cpus.c"
  local node
  for node in $(seq "$nodes"); do mkdir -p "$dir/run/cpus/node$node"; done
  # shellcheck disable=SC2016  # SLURMD_NODENAME is expanded in the task
  pretended_cpus '$SLURMD_NODENAME' | sed 's/.*/echo "export &"/; 1i #!/bin/sh' >"$dir/etc/task_prolog"
  chmod 755 "$dir/etc/task_prolog"
}

write_config() {
  local node host user controller=127.0.0.1 lines='' hosts='127.0.0.1 localhost' place
  host=$(hostname -s) user=$(id -un)
  if [ "$mode" = netns ]; then
    controller=$net.1
    hosts+=$'\n'"$controller $host"
  fi
  for node in $(seq "$nodes"); do
    read -ra place <<<"$(node_address "$node")"
    hosts+=$'\n'"${place[0]} node$node"
    [ "$mode" = local ] && place+=("$host") || place+=("node$node")
    lines+="NodeName=node$node NodeHostname=${place[2]} NodeAddr=${place[0]} Port=${place[1]}"
    lines+=" CPUs=$cpus RealMemory=1000000 Gres=gpu:$gpus State=UNKNOWN"$'\n'
  done
  echo "$hosts" >"$dir/etc/hosts"
  # No DNS for the nodes: a look-up that fails would take seconds.
  printf '%s: files\n' passwd group hosts >"$dir/etc/nsswitch.conf"
  : >"$dir/gres.conf"
  if [ "$gpus" -gt 0 ]; then echo "Name=gpu File=$(pretend_gpus)" >"$dir/gres.conf"; fi
  cat >"$SLURM_CONF" <<CONF
ClusterName=widebatch
SlurmctldHost=$host($controller)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits for its old credential to expire, 120 s by default; 5 is the least.
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/${bind:-none}
${bind:+TaskProlog=$dir/etc/task_prolog}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# There is no sacct without a database: how jobs ended is in this file.
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.log
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=10
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
CompleteWait=0
MinJobAge=600
UnkillableStepTimeout=30
${lines}PartitionName=main Nodes=ALL Default=YES DefaultTime=60 MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL DefaultTime=60 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

taken() { # has another cluster this number, or another program one of its ports?
  ip link show "$bridge" >/dev/null 2>&1 ||
    ss -Hltn "sport >= :$port and sport <= :$((port + nodes))" 2>/dev/null | grep -q .
}
settle_apart() { # the folder's number, or the next one that is free
  local first=$number
  while taken; do
    settle $((number % 250 + 1))
    [ "$number" != "$first" ] || die "no free ports between 7100 and 32100"
  done
  echo "$number" >"$dir/run/number"
}

up() {
  need_programs
  case $dir in *[[:space:]]*) die "Slurm's own files cannot have spaces in their path: set WIDEBATCH_CLUSTER" ;; esac
  [ -n "$mode" ] || { may_unshare && mode=netns; } || mode=local
  if [ "$(cat "$dir/run/shape" 2>/dev/null)" = "$(shape)" ] && healthy; then
    exports
    return
  fi
  down >/dev/null
  mkdir -p "$dir"/{run,log,spool,state,etc}
  chmod 755 "$dir" "$dir/run"
  rm -f "$dir"/log/*
  settle_apart
  prepare_binding
  write_config
  (umask 077 && head -c 1024 /dev/urandom >"$dir/run/munge.key")
  # --force: others may not enter the folder, and none of them is meant to
  daemon munged --force --key-file="$dir/run/munge.key" --socket="$dir/run/munge.sock" \
    --seed-file="$dir/run/munge.seed" --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" ||
    die "munged did not start: $(tail -n 3 "$dir/log/daemons.log")"
  if [ "$mode" = netns ]; then
    ip link add "$bridge" type bridge
    ip addr add "$net.1/24" dev "$bridge"
    ip link set "$bridge" up
  fi
  daemon slurmctld -c || die "slurmctld did not start: $(tail -n 3 "$dir/log/slurmctld.log")"
  shape >"$dir/run/shape"
  local node
  for node in $(seq "$nodes"); do node_on "$node"; done
  wait_for_nodes 30
  exports
}

down() { # from any state: half started, crashed, pid files lost
  local ours
  ours=$(our_processes)
  named() { awk -v name="^($1)$" '$2 ~ name { print $1 }' <<<"$ours"; }
  # shellcheck disable=SC2046  # lists of pids
  {
    end KILL $(named 'unshare|bash')   # a node's power
    end TERM $(named 'slurmctld|slurmd')
    ours=$(our_processes)
    end KILL $(named '[^m].*')         # steps and tasks that outlived their slurmd
    end TERM $(named 'munged')         # the others needed it to the last
  }
  ip link del "$bridge" 2>/dev/null || true
  rm -rf "${dir:?}"/{run,state,spool,etc} # the logs stay
  echo "down"
}

status() {
  if ! read_shape || ! healthy; then die "not up, or not all of it: $self up"; fi
  sinfo -N -l
  squeue -l
  exports
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in node-*) node=${1:-}; shift $(($# > 0)) ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    --install) install=yes ;;
    --bind) bind=affinity ;;
    --nodes | --cpus | --gpus | --mode)
      [ -n "${2:-}" ] || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    *) die "unknown argument '$1'" ;;
  esac
  shift
done
[[ "$nodes$cpus$gpus" =~ ^[0-9]+$ && "$nodes" -gt 0 && "$mode" =~ ^(|netns|local)$ ]] ||
  die "--nodes, --cpus and --gpus want numbers; --mode netns or local"

mkdir -p "$dir"
case $command in
  up | down | status | node-o[nf]*)
    exec 9>>"$dir/lock" # one command at a time; daemons must not hold it
    flock -w 120 9 || die "another local_cluster.sh is at work on $dir"
    ;;&
  up | down | status) "$command" 9>&- ;;
  node-on | node-off)
    read_shape || die "not up"
    [[ "${node:-}" =~ ^[0-9]+$ && "$node" -ge 1 && "$node" -le "$nodes" ]] || die "which node? 1 to $nodes"
    "${command/-/_}" "$node" 9>&-
    ;;
  *)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$self"
    exit 2
    ;;
esac
