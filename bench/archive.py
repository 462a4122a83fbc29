"""A finished run as a small folder for the repository, from which export.py makes its learner.

    python -m bench.archive RUN results/cifar100-resnet18

It has no data set and no paths of a machine: config.json, history.csv and metrics.json as they are, and
model.safetensors: the weights that count, in float16."""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save

from sifar.cli import without_folders
from sifar.files import write_file, write_json
from sifar.log import quiet_imports
from sifar.runs.load import load_run


def archive(run, folder):
    weights = load_run(run, images=False).model.state_dict()
    half = {k: to_half(v).contiguous() for k, v in weights.items()}
    assert all(torch.isfinite(v).all() for v in half.values())
    about = json.loads((run / "config.json").read_text())
    about["settings"]["dataset"] = Path(about["settings"]["dataset"]).name
    for name in ("data", "runs"): about["settings"].pop(name, None)         # whoever reads it has their own
    about["commands"] = [without_folders(line) for line in about["commands"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", about)
    for name in ("history.csv", "metrics.json"): write_file(folder / name, (run / name).read_bytes())
    write_file(folder / "model.safetensors", save(half))


def to_half(x): return x.half() if x.is_floating_point() else x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    quiet_imports()
    archive(args.run, args.folder)


if __name__ == "__main__": main()
