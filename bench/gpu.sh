#!/usr/bin/env bash
# Measure and test on a CUDA GPU, in pieces of at most nine minutes. The results belong in bench/.
#
#   bash bench/gpu.sh            runs the steps that fit into LIMIT seconds (540), and remembers which are done:
#                                call it again until it says that all is done
#   bash bench/gpu.sh STEP...    runs these steps, done or not; "list" names them
#   bash bench/gpu.sh plan       checks without a GPU that all flags and names exist
#
# DATA: the folder of CIFAR-10, which is downloaded if it is missing. STATE: the folder of all that is written (default
# /tmp/densenet-gpu). Keep STATE/out: tables, the log, and the run of 300 epochs, which another machine can resume.
# It changes no setting of the GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
LIMIT=${LIMIT:-540} STATE=${STATE:-/tmp/densenet-gpu} DATA=${DATA:-$PWD/data} PY=${PY:-python3} PLAN=""
OUT=$STATE/out NETWORK="--depth ${DEPTH:-100} --batch-size ${BATCH:-64} --precision bf16"
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$STATE/triton TORCHINDUCTOR_CACHE_DIR=$STATE/inductor XDG_CACHE_HOME=$STATE/cache

# Steps in order, each with the seconds that must be left to begin it.
STEPS="setup:60 auto:200 kernels:120 rivals:400 sweep:300 epoch:120 speed:400 tests:300 train:60"

left() { echo $((LIMIT - SECONDS)); }
stamped() { while IFS= read -r line; do printf '[%4d s] %s\n' "$SECONDS" "$line"; done; }

# A command of this repository, until 15 seconds before the end; "plan" only lists it.
run() {
  if [ -n "$PLAN" ]; then echo "$@" >> "$PLAN/commands"; else timeout -s INT -k 10 $(($(left) - 15)) "$PY" "$@"; fi
}
plan() {
  local entry
  PLAN=$(mktemp -d) && OUT=$PLAN && trap 'rm -rf "$PLAN"' EXIT
  for entry in $STEPS; do "${entry%:*}" > /dev/null || { echo "gpu.sh: step $entry fails"; exit 1; }; done
  PYTHONPATH=.:bench "$PY" - "$PLAN/commands" << 'COMMANDS'
import sys
import speed
from training.flags import make_parser
for line in open(sys.argv[1]):
    script, *flags = line.split()
    {"train.py": make_parser, "bench/speed.py": speed.make_parser}[script]().parse_args(flags)
    print("python", line, end="")
COMMANDS
}
train_py() { run train.py --dataset cifar10 --data "$DATA" --device cuda --no-plot --no-progress $NETWORK "$@"; }
speed_py() {
  run bench/speed.py --device cuda --cuda-graph --depths "${DEPTH:-100}" --batch-size "${BATCH:-64}" --precisions bf16 "$@"
}

setup() {
  [ -n "$PLAN" ] && return
  nvidia-smi --query-gpu=name,driver_version,compute_mode,mig.mode.current,memory.total,memory.used --format=csv
  git describe --always --dirty --abbrev=40 --exclude='*'
  "$PY" << 'CEILINGS'
import os, shutil, statistics, torch, triton

def microseconds(function, times=20):
    def once():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(), function(), end.record(), end.synchronize()
        return 1000 * begin.elapsed_time(end)
    once()
    return statistics.median(once() for _ in range(times))

def add():
    for _ in range(1000):
        number.add_(1)

print("torch", torch.__version__, "triton", triton.__version__, "cudnn", torch.backends.cudnn.version())
print(torch.cuda.get_device_properties(0), os.cpu_count(), "cores, compiler", shutil.which("gcc"))
x, y = torch.randn(2, 2**28, device="cuda")
print(f"copy: {2 * x.nbytes / microseconds(lambda: y.copy_(x)) / 1e6:.2f} TB/s")
m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print(f"bf16 matrix product: {2 * 8192**3 / microseconds(lambda: m @ m) / 1e6:.0f} TFLOP/s")
number, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    add()
print(f"a small kernel: {microseconds(graph.replay) / 1000:.2f} µs as a node of a graph, {microseconds(add) / 1000:.2f} eager")
CEILINGS
}

# The first epoch with default flags: is a graph used, which block, after how many seconds? The first call on a machine
# is a cold one. 141: the pipe is closed after the first epoch.
auto() {
  local temperature
  for temperature in cold warm; do
    echo "$temperature"
    train_py --epochs 300 --save "$STATE/auto" --overwrite 2>&1 | stamped | sed '/epoch   1/q' || (($? == 141)) || return
  done | tee "$OUT/auto.txt"
}

# Time by kernel of a replayed step.
kernels() { speed_py --profile --candidates fused naive | tee "$OUT/kernels.txt"; }

# torchvision's and timm's networks, compiled, the whole step as a graph, beside fused.
rivals() {
  local library
  for library in torchvision timm; do
    "$PY" -c "import importlib.util as found; exit(not found.find_spec('$library'))" || { echo "no $library"; continue; }
    [ -s "$OUT/$library.csv" ] ||
      speed_py --candidates "$library-compiled" --reference fused --csv "$OUT/$library.csv" || return
  done
}

# Programs for each multiprocessor, and rows of tiles.
sweep() {
  local constants
  for constants in "2 64" "1 64" "3 64" "4 64" "6 64" "4 16" "8 16" "2 256"; do
    [ -s "$OUT/sweep-${constants/ /-}.csv" ] ||
      speed_py --candidates fused --reference naive --kernels $constants --csv "$OUT/sweep-${constants/ /-}.csv" || return
  done
}

# A whole epoch, the last of four: training, evaluation, and the time between epochs.
epoch() {
  train_py --epochs 4 --block fused --cuda-graph --save "$STATE/epoch" --overwrite || return
  [ -n "$PLAN" ] && return
  "$PY" - "$STATE/epoch" << 'EPOCH' | tee "$OUT/epoch.txt"
import os, sys, torch
paths = [f"{sys.argv[1]}/{name}.pth" for name in ("previous", "latest")]
before, after = (torch.load(path, weights_only=True) for path in paths)
whole = os.path.getmtime(paths[1]) - os.path.getmtime(paths[0])
both = after["seconds"] - before["seconds"]
training = after["config"]["images"]["train"] / after["metrics"]["train"][-1]["images_per_second"]
print(f"an epoch: {whole:.2f} s; training {training:.2f}, evaluation {both - training:.2f}, the rest {whole - both:.2f}")
EPOCH
}

speed() {
  speed_py --reference naive --candidates fused checkpoint torchvision torchvision-channels-last --csv "$OUT/speed.csv"
}

# Triton compiles on many cores.
tests() {
  [ -n "$PLAN" ] && return
  run -m pytest -m gpu -n "${WORKERS:-8}" -q --maxfail=20 -p no:cacheprovider 2>&1 | tail -40 | tee "$OUT/pytest.txt"
}

# The paper's 300 epochs: the next call resumes them.
train() {
  train_py --epochs 300 --block fused --cuda-graph --seed "${SEED:-1}" --save "$OUT/cifar10.bc100" --resume if-any |
    stamped | tail -n 5
}

main() {
  local entry step begin rest=0
  for entry in "$@"; do
    step=${entry%:*}
    [ -e "$STATE/done/$step" ] && continue
    (($(left) < ${entry#*:})) && { echo "$step needs ${entry#*:} s, and $(left) are left"; rest=1; continue; }
    echo "== $step"; begin=$SECONDS
    if "$step"; then touch "$STATE/done/$step"; else rest=1; fi
    echo "== $step took $((SECONDS - begin)) s"
  done
  ((rest)) && echo "call again: what is done is remembered" || echo "all is done: see $OUT"
}

case ${1:-} in
  list) echo $STEPS | sed 's/:[0-9]*//g'; exit;;
  plan) plan; exit;;
  "") ;;
  *) entries=""; for step in "$@"; do
       entry=$(grep -o "\b$step:[0-9]*" <<< "$STEPS") || { echo "gpu.sh: no step $step: bash bench/gpu.sh list"; exit 2; }
       rm -f "$STATE/done/$step"; entries+=" $entry"
     done; STEPS=$entries;;
esac
mkdir -p "$STATE/done" "$OUT"
main $STEPS 2>&1 | tee -a "$OUT/log.txt"
