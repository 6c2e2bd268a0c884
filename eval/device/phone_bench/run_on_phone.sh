#!/usr/bin/env bash
# Push the static benchmark and a model file to an Android phone, and run it there once for each number of threads.
#
#   eval/device/phone_bench/run_on_phone.sh DEVICE_BENCH MODEL OUT [THREADS] [PROMPT] [ANSWER]
#
# DEVICE_BENCH, MODEL: the program and a model file that `make device-bench` made, or one with weights.
# OUT: receives a line of JSON about the phone, and one of every run (docs/on_device.md).
# THREADS: numbers in quotation marks, "1 2 4 8" if not given. PROMPT and ANSWER: tokens, 128 and 64.
set -euo pipefail

[[ $# -ge 3 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
program=$1 model=$2 out=$3 threads=${4:-1 2 4 8} prompt=${5:-128} answer=${6:-64}
remote=/data/local/tmp/mobilemoe

for number in $threads "$prompt" "$answer"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "$number: THREADS, PROMPT and ANSWER are whole numbers from 1" >&2; exit 2; }
done
for file in "$program" "$model"; do
  [[ -f $file ]] || { echo "$file: no such file" >&2; exit 2; }
done
[[ $(adb get-state 2>/dev/null) == device ]] || { echo "adb sees no phone; enable USB debugging and connect one" >&2; exit 2; }

mkdir -p "$(dirname "$out")"
adb shell mkdir -p $remote
adb push --sync "$program" $remote/device_bench # names of our own: the phone's shell would split others at their spaces
adb push --sync "$model" $remote/bench.model
adb shell chmod +x $remote/device_bench

name=$(adb shell getprop ro.product.model </dev/null | tr -d '"\\\r\n') || name=unknown
printf '{"phone": "%s"}\n' "$name" > "$out.partial"
for n in $threads; do
  adb shell "cd $remote && ./device_bench bench.model --threads $n --prompt $prompt --answer $answer" </dev/null \
    | tr -d '\r' | tee -a "$out.partial"
done
mv "$out.partial" "$out"
