#!/usr/bin/env bash
# Everything that one loan of a CUDA GPU can prove, in order of worth: accuracy of the presets, and what
# limits the speed.
#
#     SIFAR_DATA=DIR MINUTES=9 bash bench/flagship.sh OUT [PART...]
#
# Parts, all of them by default: check limits sprint best standard. What is finished is left alone and what
# broke off goes on, so a second call continues the first; MINUTES ends the whole cleanly. Runs lie in RUNS
# (default OUT/runs), logs and tables in OUT. On a CPU at a tiny size, as a trial:
#     DATASET=digits TINY="--arch resnet8 --epochs 1 --bs 32" \
#         LIMITS="--images 256 --bs 64 --arch resnet8" bash bench/flagship.sh OUT
set -uo pipefail
out=$1; shift
parts=${*:-check limits sprint best standard}
python=${PYTHON:-python}
runs=${RUNS:-$out/runs}
dataset=${DATASET:-cifar100}
start=$(date +%s)
mkdir -p "$out" "$runs"

seconds_left() { echo $((start + ${MINUTES:-100000} * 60 - $(date +%s))); }

# NAME LIMIT COMMAND...: run it for at most LIMIT seconds or what is left, its output in NAME.txt
try() {
    local name=$1 limit=$2 left code=0; shift 2
    left=$(seconds_left)
    [ "$left" -gt 15 ] || { echo "$name: no time was left" | tee -a "$out/failed.txt"; return 1; }
    timeout -s TERM -k 20 $((limit < left ? limit : left)) "$@" >> "$out/$name.txt" 2>&1 || code=$?
    echo "$(($(date +%s) - start)) s: $name ended with $code" | tee -a "$out/times.txt"
    return $code
}

train() {       # NAME LIMIT OPTIONS...: train a run of that name, or go on with it
    local name=$1 limit=$2 run=$runs/$dataset/$1; shift 2
    [ -e "$run/metrics.json" ] && return
    if [ -e "$run/models/last.pth" ]; then
        try "$name" "$limit" "$python" -W ignore train.py --resume "$run"
    else
        try "$name" "$limit" "$python" -W ignore train.py --dataset "$dataset" --runs "$runs" --name "$name" \
            --augment batch --valid-pct 0 "$@" ${TINY:-}
    fi
    for file in metrics.json history.csv config.json; do
        [ -e "$run/$file" ] && cp "$run/$file" "$out/$name.$file"
    done
}

check() {       # versions, device, an epoch of two presets: do they work, and how fast are they
    {
        nvidia-smi || echo "no NVIDIA GPU: a trial"
        "$python" -c "import sys, torch, fastai; print(sys.version, torch.__version__, fastai.__version__)"
    } > "$out/machine.txt" 2>&1
    try check 90 "$python" -W ignore -m bench.sweep "$out/check.csv" --preset standard --seeds 1 -- \
        "--dataset $dataset --augment batch --epochs 2 ${TINY:-}" \
        "--dataset $dataset --preset sprint --epochs 2 --sizes 32 ${TINY:-}" \
        "--dataset $dataset --augment batch --epochs 2 --bs 512 ${TINY:-}"
}

limits() {
    try profile 60 "$python" -W ignore train.py --dataset "$dataset" --preset sprint --profile ${TINY:-}
    try limits 150 "$python" -W ignore -m bench.limits --workers 0 ${LIMITS:---bs 512 128}
}

sprint() { for seed in 1 2 3; do train "sprint-$seed" 120 --preset sprint --seed "$seed"; done; }

standard() {    # by CUDA graphs, as batches of 128 are too small for the host to start their kernels one by one
    for seed in 1 2 3; do train "standard-$seed" 600 --seed "$seed" & done
    wait
}

best() {
    for seed in 1 2 3; do train "best-$seed" 400 --preset best --seed "$seed" & done
    wait
}

for part in $parts; do $part; done
shopt -s nullglob
finished=("$runs/$dataset"/*/metrics.json)
[ ${#finished[@]} = 0 ] && exit
compare=("$python" -W ignore -m sifar.compare --plot "$out/curves.png")
"${compare[@]}" "${finished[@]%/metrics.json}" | tee "$out/table.txt"
