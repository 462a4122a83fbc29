#!/usr/bin/env bash
# The flagship on one machine with a CUDA GPU: 100 epochs of ResNet-18, three seeds, and what limits the speed.
#
#     SIFAR_DATA=DIR bash bench/flagship.sh OUT [options of train.py for all runs]
#
# Each result is in OUT as soon as it is there, and what fails does not stop the rest; run again, it goes on where it broke off.
# MINUTES=8 ends it cleanly after so long. CIFAR10=FOLDER takes CIFAR-10 as a folder of images. The first seed trains alone, as its
# time counts; the other runs share the GPU, as one of them does not fill it. Tried on a CPU at a tiny size:
#     LIMITS="--images 128 --workers 0 1 --arch resnet8" BATCHES=64 SHORT=1 bash bench/flagship.sh OUT --arch resnet8 --epochs 1
set -uo pipefail
out=$1; shift
python=${PYTHON:-python}
end=$((SECONDS + ${MINUTES:-100000} * 60))
mkdir -p "$out"

try() {         # NAME, then a command: run it within the time that is left, with its output in NAME.txt
    local name=$1 seconds=$((end - SECONDS)) code=0; shift
    [ $seconds -gt 30 ] || return 1
    timeout -s TERM -k 20 $seconds "$@" >> "$out/$name.txt" 2>&1 || code=$?
    [ $code = 0 ] || echo "$name ended with $code" | tee -a "$out/failed.txt"
    return $code
}

train() {       # NAME, dataset, then options: train, or go on with what is there, or leave alone what is finished
    local name=$1 dataset=$2; shift 2
    local run; run="$out/runs/$(basename "$dataset")/$name"
    if [ -e "$run/metrics.json" ]; then return; fi
    if [ -e "$run/models/last.pth" ]; then try "$name" "$python" train.py --resume "$run"
    else try "$name" "$python" train.py --dataset "$dataset" --runs "$out/runs" --name "$name" --augment batch "$@"; fi
    "$python" -m bench.table "$out"/runs/*/* > "$out/table.md" 2>> "$out/failed.txt"
}

nvidia-smi > "$out/gpu.txt" 2>&1 || echo "no NVIDIA GPU: a trial" | tee "$out/gpu.txt"
train standard-1 cifar100 --valid-pct 0 --seed 1 "$@"
train fast-batches cifar100 --valid-pct 0 --seed 1 --bs 512 --lr 0.2 "$@"
for bs in ${BATCHES:-512 128 1024}; do
    [ -e "$out/limits-$bs.done" ] && continue
    rm -f "$out/limits-$bs.txt"
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) try "limits-$bs" "$python" -m bench.limits --bs "$bs" ${LIMITS:-} && touch "$out/limits-$bs.done"
done
for seed in 2 3; do train "standard-$seed" cifar100 --valid-pct 0 --seed "$seed" "$@" & done
train standard-valid cifar100 "$@" &
wait
train 20-epochs-auto cifar100 --seed 1 "$@" --epochs "${SHORT:-20}" &
NVIDIA_TF32_OVERRIDE=0 train 20-epochs-fp32 cifar100 --seed 1 --precision fp32 "$@" --epochs "${SHORT:-20}" &
train cifar10 "${CIFAR10:-cifar10}" --valid-pct 0 --seed 1 "$@" &
wait

# the run whose test top-1 is the median of the seeds becomes the model of this repository
finished=("$out"/runs/cifar100/standard-[0-9]*/metrics.json)
[ ${#finished[@]} = 3 ] && median=$("$python" -m bench.table --median "$out"/runs/cifar100/standard-[0-9]*) && try archive "$python" -m bench.archive "$median" "$out/cifar100-resnet18"
"$python" -m sifar.compare --plot "$out/seeds.png" "$out"/runs/cifar100/standard-[0-9]*
"$python" -m bench.table "$out"/runs/*/* | tee "$out/table.md"
