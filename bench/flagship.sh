#!/usr/bin/env bash
# The flagship on one machine with a CUDA GPU: 100 epochs of ResNet-18, three seeds, and what limits the speed.
#
#     SIFAR_DATA=DIR bash bench/flagship.sh OUT [options of train.py for all runs]
#
# Each result is in OUT as soon as it is there; run again, it goes on where it broke off. Tried on a CPU at a tiny size:
#     LIMITS="--images 128 --bs 64 --workers 0 1 --arch resnet8" SEEDS="1 2" SHORT=1 bash bench/flagship.sh OUT --arch resnet8 --epochs 1
# CIFAR10=FOLDER takes CIFAR-10 as a folder of images.
set -euo pipefail
out=$1; shift
python=${PYTHON:-python}
mkdir -p "$out"

train() {       # NAME, then options: train, or go on with what is there, or leave alone what is finished
    local name=$1 dataset=$2; shift 2
    local run; run="$out/runs/$(basename "$dataset")/$name"
    if [ -e "$run/metrics.json" ]; then return; fi
    if [ -e "$run/models/last.pth" ]; then "$python" train.py --resume "$run"
    else "$python" train.py --dataset "$dataset" --runs "$out/runs" --name "$name" --augment batch "$@"; fi 2>&1 | tee -a "$out/log.txt"
}

nvidia-smi > "$out/gpu.txt" 2>&1 || echo "no NVIDIA GPU: a trial" | tee "$out/gpu.txt"
for seed in ${SEEDS:-1 2 3}; do train "standard-$seed" cifar100 --valid-pct 0 --seed "$seed" "$@"; done
"$python" -m sifar.compare --plot "$out/seeds.png" "$out"/runs/cifar100/standard-[0-9]* 2>&1 | tee "$out/seeds.txt"
if [ ! -e "$out/limits.md" ]; then
    "$python" -m bench.limits ${LIMITS:-} > "$out/limits.part" 2>> "$out/log.txt"
    mv "$out/limits.part" "$out/limits.md"
fi
train standard-valid cifar100 "$@"
for precision in fp32 auto; do train "20-epochs-$precision" cifar100 --seed 1 --precision "$precision" "$@" --epochs "${SHORT:-20}"; done
train fast-batches cifar100 --valid-pct 0 --seed 1 --bs 512 --lr 0.2 "$@"

# the run whose test top-1 is the median of the seeds becomes the model of this repository
median=$("$python" - "$out"/runs/cifar100/standard-[0-9]* <<'PY'
import json, pathlib, sys
runs = sorted(map(pathlib.Path, sys.argv[1:]), key=lambda o: json.loads((o / "metrics.json").read_text())["test"]["top1"])
print(runs[(len(runs) - 1) // 2])
PY
)
"$python" -m bench.archive "$median" "$out/cifar100-resnet18"
train cifar10 "${CIFAR10:-cifar10}" --valid-pct 0 --seed 1 "$@"
echo "All of it is in $out; $median is the median seed."
