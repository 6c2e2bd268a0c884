#!/bin/bash
# A whole Slurm on this machine, to test job scripts: one controller and NODES (default 2) nodes, no systemd, no accounting.
#
#   slurm/one_machine/up.sh DIR [NODES]     start what does not run yet; all state, logs and keys live in DIR
#   export SLURM_CONF=DIR/slurm.conf        then sbatch, squeue, scancel, ... talk to it
#   slurm/one_machine/down.sh DIR           stop it, and with it every process of every job
#
# Needs root and the packages slurm-wlm and munge (Debian, Ubuntu). Ports and the first job id follow from DIR, so several
# clusters can stand side by side. Each node lives in its own PID namespace: `kill -9 $(cat DIR/node2.pid)` is a node crash.
set -euo pipefail

fail() {
    echo "up.sh: $*" >&2
    exit 1
}

[[ $# == 1 || $# == 2 ]] || fail "usage: up.sh DIR [NODES]"
nodes=${2:-2}
[[ $nodes =~ ^[1-9]$ ]] || fail "NODES is '$nodes'; give a number from 1 to 9"
missing=()
for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || missing+=("$program")
done
((${#missing[@]} == 0)) || fail "missing ${missing[*]}: run apt-get install slurm-wlm munge"
((EUID == 0)) || fail "needs root: slurmd starts jobs and puts them into cgroups"
[[ -d /sys/fs/cgroup/freezer ]] || fail "no cgroup v1 freezer at /sys/fs/cgroup/freezer: Slurm tracks a job's processes with it"

mkdir -p "$1"
dir=$(cd "$1" && pwd)
# Numbers of this cluster's own: 0..999 from the path.
slot=$(($(cksum <<<"$dir" | cut -d' ' -f1) % 1000))
first_port=$((10000 + 10 * slot))
mkdir -p "$dir/spool" "$dir/state" "$dir/munge"
chmod 700 "$dir/munge" # munged refuses a key that others could replace

[[ -f $dir/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")

cat >"$dir/slurm.conf" <<CONF
ClusterName=one_machine
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$first_port
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job starts again after its credential has expired: 5 s instead of 2 minutes.
AuthInfo=socket=$dir/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/state/slurmctld.pid
SlurmdPidFile=$dir/spool/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
SlurmdParameters=config_overrides
# A job's processes are found by cgroup; by parent process, daemons would escape.
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
# Look at the queue every 2 s: by default a requeued job waits for up to a minute.
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=15
MinJobAge=3600
FirstJobId=$((1000 + slot))
DefMemPerCPU=500
NodeName=node[1-$nodes] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[$((first_port + 1))-$((first_port + nodes))] CPUs=4 RealMemory=10000 Gres=gpu:2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
cat >"$dir/cgroup.conf" <<CONF
CgroupPlugin=cgroup/v1
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=no
ConstrainSwapSpace=no
CONF
# Counted and handed out like GPUs; the device files stand in for real ones and are never opened.
echo "Name=gpu File=/dev/zero,/dev/full" >"$dir/gres.conf"
export SLURM_CONF=$dir/slurm.conf

# start NAME COMMAND...: runs a daemon in the foreground mode it has, so that the recorded pid is really its own.
start() {
    local name=$1 pid_file=$dir/$1.pid
    shift
    if [[ -f $pid_file ]] && grep -qsF "$dir" "/proc/$(<"$pid_file")/cmdline"; then
        return
    fi
    setsid "$@" </dev/null >>"$dir/$name.out" 2>&1 &
    echo $! >"$pid_file"
}

# until_true SECONDS WHAT COMMAND...
until_true() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > deadline)); then
            tail -n 5 "$dir"/*.out "$dir"/*.log >&2 || true
            fail "$what; the logs are in $dir"
        fi
        sleep 0.2
    done
}

start munged munged --foreground --force --socket="$dir/munge.sock" --key-file="$dir/munge/key" \
    --pid-file="$dir/munge/pid" --log-file="$dir/munged.log" --seed-file="$dir/munge/seed"
until_true 10 "munged does not answer" test -S "$dir/munge.sock"
start slurmctld slurmctld -D -f "$dir/slurm.conf"
for ((i = 1; i <= nodes; i++)); do
    # The last word of the inner shell keeps it from replacing itself by slurmd: it is the namespace's init and reaps orphans.
    start "node$i" unshare --pid --fork --kill-child=KILL --mount-proc \
        bash -c 'slurmd -D -N "$1" -f "$2" & wait' slurm_node "node$i" "$dir/slurm.conf"
done
all_idle() { [[ $(sinfo --noheader --Node --format=%t | grep -cE '^(idle|mix|alloc)$') == "$nodes" ]]; }
until_true 30 "the nodes did not become idle" all_idle
echo "Slurm runs with $nodes node(s). Next: export SLURM_CONF=$dir/slurm.conf"
