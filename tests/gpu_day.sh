#!/bin/bash
# First day on a GPU: does everything run, how fast is it, and where does the time go?
#
#   bash tests/gpu_day.sh [FOLDER]         default: logs/gpu_day_<time stamp>; at most 12 minutes, no network
#
# FOLDER receives a log for each part, the run folders, a trace and summary.txt. A part that fails or hangs does not
# stop the others. Exit code 0: all parts passed; 1: some failed; 2: no GPU, or FOLDER is not empty. A kernel that this
# machine lacks is reported as unavailable, which is not a failure.
#
# Data: DATA_PATH and TOKENIZER_PATH if set, else ./data/datasets/fineweb10B_sp1024, else made here from the sources and
# documents of this checkout. With a vocabulary of 8,192 pieces (VOCAB_SIZE=8192, or ./data/datasets/fineweb10B_sp8192)
# the frontier recipe with 8,192 pieces is used. PYTHON names the interpreter. LIMIT_<part>=SECONDS replaces the time
# limit of a part, TOTAL=SECONDS the overall limit.
set -u

python=${PYTHON:-python3}
folder=$(realpath -m "${1:-$(dirname "$0")/../logs/gpu_day_$(date +%Y-%m-%d_%H-%M-%S)}")
for name in DATA_PATH TOKENIZER_PATH; do
  [[ -e ${!name:-} ]] && export "$name=$(realpath "${!name}")"
done
cd "$(dirname "$0")/.." || exit 2

gpus=$(timeout 60 "$python" -c "import torch; print(torch.cuda.device_count())" 2>&1 | tail -1)
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu_day: no CUDA GPU: torch.cuda.device_count() in $python gives: ${gpus:-nothing}" >&2
  exit 2
fi
if [[ -n $(ls -A "$folder" 2>/dev/null) ]]; then
  echo "gpu_day: $folder is not empty: name another folder" >&2
  exit 2
fi
mkdir -p "$folder" || exit 2
# Compiled code is cached in the folder, so that the first part shows the compile time on a new machine.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$folder/cache/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$folder/cache/triton}
export PYTHONUNBUFFERED=1 TORCH_LOGS=${TORCH_LOGS:-recompiles} LOG_DIR=$folder

summary=$folder/summary.txt
failed=0
deadline=$SECONDS # of the current part, since the script started: later parts may use the time that is left over
total=${TOTAL:-705} # the rest of the 12 minutes is for processes that do not end when asked to

row() { printf '%-20s %4s %7s  %s\n' "$@" | tee -a "$summary"; }

# The last value of KEY:VALUE in matching lines, as formatted in a log.
last() { grep -E "$2" "$1" | tail -1 | grep -oE "$3"; }

# The key figure of a part, from its log.
figure() {
  local log=$1
  {
    sed -n 's/^figure: //p' "$log" | tail -1
    last "$log" '^train: [0-9]' '[0-9,]+ documents.*tokens'                           # data
    last "$log" '(passed|failed|error|skipped).* in [0-9.]+s' '[0-9]+ [a-z]+.*[0-9]s' # pytest
    last "$log" '^start_to_first_step' '^start_to_first_step:[^ ]+'                   # runs
    last "$log" '^step:.*train_loss:' '(step|train_loss|step_avg|tok/s|mfu):[^ ]+'
    last "$log" '^final_.*_roundtrip ' 'val_bpb:[^ ]+'
    last "$log" '^peak memory' 'allocated: [0-9]+ MiB'
    last "$log" '^(clock|size)_verdict:.*NOT A VALID' '^[a-z]+_verdict:.*NOT A VALID'
    grep -c '^warning' "$log" | sed '/^0$/d; s/$/ warnings/'
  } | paste -sd ' '
}

# torchrun's workers have their own sessions and may survive it. They would slow down the next part.
end_leftovers() {
  local pid
  for pid in $(grep -lsz "^GPU_DAY=$$\$" /proc/[0-9]*/environ | cut -d/ -f3); do
    kill -9 "$pid" 2>/dev/null
  done
}

# The first error in a log, else its last line. torchrun's own error comes last and is not informative.
error_in() {
  local pattern='^(error:|[A-Za-z_.]*(Error|Exception): )'
  { grep -E "$pattern" "$1" | grep -v ChildFailedError || tail -1 "$1"; } | head -1 | cut -c1-120
}

# part NAME SECONDS COMMAND...: run it into its own log and write its row of the summary.
part() {
  local name=$1 log=$folder/$1.log began=$SECONDS given=LIMIT_$1 limit code said
  deadline=$((deadline + $2 < total ? deadline + $2 : total))
  limit=${!given:-$((deadline - SECONDS))}
  shift 2
  echo "== $name, at most $limit s: $*" >"$log"
  if ((limit > 0)); then
    # In the background, so that Ctrl-C is handled at once.
    GPU_DAY=$$ timeout -k 10 "$limit" "$@" >>"$log" 2>&1 </dev/null &
    wait $! 2>/dev/null
    code=$?
  else
    code=124
    limit=0
  fi
  end_leftovers
  said=$(figure "$log")
  if ((code == 3)) && grep -q '^unavailable: ' "$log"; then
    said="unavailable: $(sed -n 's/^unavailable: //p' "$log" | sed 's/.*failed: //' | cut -c1-100)"
  elif ((code)); then
    failed=1
    case $code in
      124) said="$( ((limit)) && echo "STOPPED after $limit s" || echo "no time left"); $said" ;;
      137) said="KILLED, at the limit of $limit s or for memory; $said" ;;
      *) said="FAILED: $(error_in "$log"); $said" ;;
    esac
  fi
  row "$name" "$code" "$((SECONDS - began))" "$said"
}

finish() {
  [[ -n ${monitor:-} ]] && { kill "$monitor" && wait "$monitor"; } 2>/dev/null
  local verdict='all parts passed'
  ((failed)) && verdict='SOME PARTS FAILED'
  printf '\n%s: %s, %s s\n' "$folder" "$verdict" "$SECONDS" | tee -a "$summary"
}

interrupted() {
  exec 2>/dev/null # hide the shell's own messages about killed processes
  end_leftovers
  row interrupted 130 "" "only the parts above are done"
  failed=1
  finish
  exit 1
}
trap interrupted INT TERM

row part exit seconds figure
# Clocks, power and temperature over the day, if the driver reports them.
if command -v nvidia-smi >/dev/null; then
  fields=timestamp,index,clocks.sm,power.draw,temperature.gpu,utilization.gpu,memory.used
  nvidia-smi --query-gpu=$fields --format=csv -l 5 >"$folder/gpu.csv" 2>&1 </dev/null &
  monitor=$!
fi

part environment 15 bash -c '
  git log -1 --format="commit %H %cd %s"; git status --short | head
  uname -srm; nproc; free -g; df -h .
  nvidia-smi; nvidia-smi topo -m
  "$0" - <<END
import platform
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
for i in range(len(names)):
    print(torch.cuda.get_device_properties(i))
try:
    import triton
    compiler = triton.__version__
except ImportError:
    compiler = "missing"
print("cudnn", torch.backends.cudnn.version(), "flags", torch.__config__.show())
print("figure:", len(names), "x", names[0], "python", platform.python_version(), "torch", torch.__version__,
      "triton", compiler, "cuda", torch.version.cuda)
END' "$python"

# The data.
[[ ${DATA_PATH:-} == *sp8192* ]] && export VOCAB_SIZE=${VOCAB_SIZE:-8192}
if [[ -z ${DATA_PATH:-} ]] && ! compgen -G "data/datasets/fineweb10B_sp1024/fineweb_val_*.bin" >/dev/null; then
  part data 30 bash -c '
    find README.md train_gpt.py data records tests tools \( -name "*.py" -o -name "*.md" \) -type f |
      sort | xargs cat | "$0" data/tokenize_text.py - --format txt --document-bytes 4096 --val-share 0.1 \
      --tokenizer train:sp1024 --name gpu_day_sp1024 --out "$1"' "$python" "$folder/data"
  export DATA_PATH=$folder/data/datasets/gpu_day_sp1024 TOKENIZER_PATH=$folder/data/tokenizers/gpu_day_sp1024.model
fi

# The smallest run that compiles and executes a real step, so that basic failures show first.
part steps 80 "$python" tests/bench/profile_step.py --trace "$folder/trace.json.gz"

# No pytest-xdist: without addopts all tests run in one process. At its limit pytest still reports failures.
pytest='import signal, sys, pytest; signal.signal(signal.SIGTERM, signal.default_int_handler); sys.exit(pytest.main())'
mapfile -t gpu_tests < <(grep -lE 'mark[.]gpu' tests/test_*.py)
part tests 140 "$python" -c "$pytest" -o addopts= -m gpu -v --durations=10 "${gpu_tests[@]}"

# A batch is 96 sequences, which five or seven GPUs cannot divide.
ranks=$gpus
while ((96 % ranks)); do ranks=$((ranks - 1)); done
launcher=("$python")
((ranks > 1)) && launcher+=(-m torch.distributed.run --standalone "--nproc_per_node=$ranks")

# A fixed number of targets keeps validation on one GPU short; the score is labeled partial.
export MAX_WALLCLOCK_SECONDS=60 TRAIN_LOG_EVERY=10
part defaults 110 env RUN_ID=defaults WARMUP_STEPS=5 VAL_TOKENS_LIMIT=1048576 \
  "${launcher[@]}" train_gpt.py

recipe=frontier_sp1024
other_data=()
if [[ ${VOCAB_SIZE:-} == 8192 ]]; then
  recipe=frontier_sp8192
elif compgen -G "data/datasets/fineweb10B_sp8192/fineweb_val_*.bin" >/dev/null; then
  recipe=frontier_sp8192
  other_data=(-u DATA_PATH -u TOKENIZER_PATH -u VOCAB_SIZE)
fi
# All contexts and loops from the start: one graph to compile instead of three, which would take minutes.
part frontier 210 env "${other_data[@]}" RUN_ID=frontier WARMUP_STEPS=2 VAL_TOKENS_LIMIT=65536 \
  CONTEXTS=2048@0 LOOP_START=0 "${launcher[@]}" train_gpt.py records/recipes/$recipe.env

# With three layers, which compile in a third of the time.
for attention in flash cudnn efficient flash3 math; do
  part "attention_$attention" 24 env ATTENTION=$attention NUM_LAYERS=3 \
    "$python" tests/bench/profile_step.py --profile 0 --seconds 3
done

finish
exit $failed
