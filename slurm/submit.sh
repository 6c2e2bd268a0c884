#!/bin/bash
# Submits a run as a chain of jobs, each of the size that its part of the work needs:
#
#   slurm/submit.sh --data   "--partition=cpu --nodes=16 --cpus-per-task=64 --mem=0" \
#                   --train  "--partition=gpu --nodes=32 --gpus-per-node=8 --cpus-per-task=64 --mem=0" \
#                   --finish "--partition=gpu --nodes=1 --gpus-per-node=8 --cpus-per-task=64 --mem=0" \
#                   -- l --out /shared/runs/l
#
#   --data     as far as the shards; no GPU
#   --train    the four stages
#   --finish   export, evaluation, formats, profile and report
#
# Each takes options of sbatch for one job of slurm/mobilemoe.sbatch. A part that is left out is done by the next job.
# What stands after -- goes to `mobilemoe run`, in all jobs. A job begins when the one before has succeeded; when that
# one fails, the later ones are removed from the queue, and the same command continues the run.
set -euo pipefail

fail() {
    echo "submit.sh: $*" >&2
    exit 2
}

usage='usage: submit.sh [--data OPTIONS] [--train OPTIONS] --finish OPTIONS -- RECIPE|FILE.py --out DIR [overrides]'
script=$(dirname "$(realpath "$0")")/mobilemoe.sbatch
declare -A options=() until=([data]=data [train]=qat [finish]='')
while (($#)) && [[ $1 != -- ]]; do
    part=${1#--}
    [[ $1 == --* && -v until[$part] ]] || fail "$1 is no part of a run; $usage"
    (($# > 1)) && [[ $2 != -- ]] || fail "$1: give sbatch's options for this job, in quotes; $usage"
    options[$part]=$2
    shift 2
done
(($# > 1)) || fail "$usage"
shift
[[ -v options[finish] ]] || fail "--finish is missing: the last job evaluates and exports; $usage"
for word in "$@"; do
    [[ $word != --until* && $word != --from* ]] || fail "$word: each job has its own; run that by slurm/mobilemoe.sbatch"
done

jobs=()
trap '((${#jobs[@]} == 0)) || scancel "${jobs[@]}"; echo "submit.sh: $part was refused; what was submitted was cancelled" >&2' ERR
for part in data train finish; do
    [[ -v options[$part] ]] || continue
    read -ra words <<<"${options[$part]}"
    ((${#jobs[@]} == 0)) || words+=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    arguments=(run "$@")
    [[ -z ${until[$part]} ]] || arguments+=(--until "${until[$part]}")
    job=$(sbatch --parsable --job-name="mobilemoe-$part" "${words[@]}" "$script" "${arguments[@]}")
    jobs+=("${job%%;*}") # a cluster's name may follow
    echo "$part: job ${jobs[-1]}"
done
