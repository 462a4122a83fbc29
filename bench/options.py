"""What each option of training brings by itself, at a small budget, as rows of a Markdown table.

    python -m bench.options [--epochs 3] [--only opt aug ...]   # CIFAR-100; SIFAR_DATA or data/ by default

The columns are valid top-1, loss and images/s. All else is as in --preset fast, on images of 16 pixels,
validation too; a tenth of the training images is held out, and the test set is not looked at."""
import argparse
from dataclasses import replace

from bench.sweep import fit
from sifar.config import TrainConfig, flag
from sifar.log import log_to_screen, quiet_imports

CHANGES = [
    {}, {"seed": 43},
    {"augment": "item"}, {"precision": "fp32"}, {"sizes": "12,12,16"},
    {"opt": "sgd"}, {"opt": "adamw"}, {"schedule": "cosine"},
    {"wd_norm": True}, {"clip": 1.0}, {"ema": 0.99},
    {"mixup": 0.2}, {"cutmix": 1.0}, {"cutmix": 1.0, "mix_prob": 0.5},
    {"aug": "standard"}, {"aug": "trivial", "augment": "item"}, {"aug": "rand", "augment": "item"},
]


def named(name, value): return f"`{flag(name)}`" if value is True else f"`{flag(name)} {value}`"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=TrainConfig().data)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", nargs="+", help="names of settings: the rows that change one of them")
    args = parser.parse_args()
    quiet_imports()
    log_to_screen()
    from sifar.data.datasets import load_data
    from sifar.training.callbacks import GrowImages
    GrowImages.run_valid = True                 # the images of validation are as small
    base = TrainConfig(preset="fast", data=args.data, arch=args.arch, epochs=args.epochs, seed=args.seed,
                       sizes="16", valid_pct=0.1)
    print("| changed | valid top-1, % | valid loss | images/s |\n|---|---|---|---|", flush=True)
    for change in CHANGES:
        if args.only and change and not set(args.only) & set(change): continue
        cfg = replace(base, **change)
        row = fit(cfg, load_data(cfg))
        what = ", ".join(named(k, v) for k, v in change.items()) or "nothing"
        top1, loss, rate = row["top1"], row["loss"], row["images_per_second"]
        print(f"| {what} | {top1:.2f} | {loss:.3f} | {rate:.0f} |", flush=True)


if __name__ == "__main__": main()
