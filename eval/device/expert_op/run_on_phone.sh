#!/usr/bin/env bash
# Push an ExecuTorch program to an Android phone, run it there on the prompts of three domains, and collect the timings.
#
#   eval/device/expert_op/run_on_phone.sh PROGRAM_FOLDER LLAMA_MAIN OUT_FOLDER [THREADS] [NEW_TOKENS]
#
# PROGRAM_FOLDER: the folder that `mobilemoe export --format executorch --expert-op stock` wrote.
# LLAMA_MAIN: ExecuTorch's runner, built for arm64-v8a (docs/on_device.md has the commands).
# OUT_FOLDER: receives DOMAIN.log (the runner's output) and DOMAIN.json (its statistics and the peak memory in kB).
set -euo pipefail

[[ $# -ge 3 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 runner=$2 out=$3 threads=${4:-4} new_tokens=${5:-128}
prompts=$(dirname "$0")/../prompts
remote=/data/local/tmp/mobilemoe

for number in "$threads" "$new_tokens"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "$number: THREADS and NEW_TOKENS are whole numbers from 1" >&2; exit 2; }
done
for file in "$folder/model.pte" "$folder/tokenizer.json" "$runner"; do
  [[ -f $file ]] || { echo "$file: no such file" >&2; exit 2; }
done
if grep -q '"uses_fast_expert_op": true' "$folder/program.json"; then
  echo "$folder: exported with --expert-op fast, which llama_main does not have; export with --expert-op stock" >&2
  exit 2
fi
[[ $(adb get-state 2>/dev/null) == device ]] || { echo "adb sees no phone; enable USB debugging and connect one" >&2; exit 2; }

mkdir -p "$out"
adb shell mkdir -p $remote
adb push --sync "$folder/model.pte" "$folder/tokenizer.json" "$runner" "$prompts"/*.txt $remote/
adb shell chmod +x "$remote/$(basename "$runner")"

for domain in knowledge code maths; do
  # The runner is polled for its peak memory; its statistics are one line of JSON after "PyTorchObserver".
  adb shell "cd $remote || exit 1; ./$(basename "$runner") --model_path model.pte --tokenizer_path tokenizer.json \
      --prompt_file $domain.txt --temperature 0 --ignore_eos --max_new_tokens $new_tokens --cpu_threads $threads --warmup \
      > run.log 2>&1 & pid=\$!; while grep VmHWM /proc/\$pid/status > peak.new 2>/dev/null; do mv peak.new peak; sleep 0.1; done;
      wait \$pid; code=\$?; cat peak >> run.log; exit \$code"
  adb pull -q "$remote/run.log" "$out/$domain.log"
  stats=$(sed -n 's/.*PyTorchObserver \({.*}\).*/\1/p' "$out/$domain.log" | tail -1)
  peak=$(sed -n 's/VmHWM:[[:space:]]*\([0-9]*\) kB/\1/p' "$out/$domain.log" | tail -1)
  printf '{"domain": "%s", "threads": %s, "peak_kb": %s, "stats": %s}\n' \
    "$domain" "$threads" "${peak:-null}" "${stats:-null}" > "$out/$domain.json"
  cat "$out/$domain.json"
done
