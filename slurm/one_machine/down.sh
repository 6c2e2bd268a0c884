#!/bin/bash
# Stops the Slurm that up.sh started in DIR, and every process of every job on it. DIR itself stays, for its logs.
set -euo pipefail

[[ $# == 1 ]] || {
    echo "usage: down.sh DIR" >&2
    exit 1
}
[[ -d $1 ]] || exit 0
dir=$(cd "$1" && pwd)

for pid_file in "$dir"/node?.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    [[ -f $pid_file ]] || continue
    pid=$(<"$pid_file")
    # The pid may have gone to somebody else since: only a process that names DIR is ours.
    if grep -qsF "$dir" "/proc/$pid/cmdline"; then
        # A node dies as a whole: unshare is its parent, and the namespace goes with it.
        kill -KILL "$pid"
        while [[ -d /proc/$pid ]] && ! grep -qs '^State:.Z' "/proc/$pid/status"; do sleep 0.1; done
    fi
    rm -f "$pid_file"
done
rm -f "$dir/munge.sock"
