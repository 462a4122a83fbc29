#!/usr/bin/env python
"""One learner file of a finished run, and a Space that shows it: python export.py runs/cifar100/RUN"""
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sifar.cli import cli, one_line_errors
from sifar.log import command, log, log_to_screen, quiet_imports


@dataclass
class ExportConfig:
    """Write the learner.pkl and the model.json of a finished run into its folder, and what else is named."""
    run: Positional[Path | None] = None
    "run folder; else the run that was finished last"
    onnx: bool = False
    "also write model.onnx: images uint8 in, probabilities out"
    weights: bool = False
    "also write model.safetensors"
    space: Path | None = None
    "also write a complete Hugging Face Space into this folder"
    push: str | None = None
    "upload the Space to USER/NAME on Hugging Face"


def export(cfg):
    "Write what `cfg` asks for; returns the path of the learner file."
    from sifar.runs.run import newest_run
    from sifar.share.export import check_onnx, export_run, write_onnx, write_weights
    from sifar.share.space import check_folder, check_push, push_space, write_space

    run = cfg.run or newest_run()
    # what cannot work fails before the work, and leaves an earlier export as it is
    if cfg.onnx: check_onnx()
    if cfg.space: check_folder(cfg.space)
    if cfg.push is not None: check_push(cfg.push)
    learn = export_run(run)
    if cfg.onnx: write_onnx(learn, run / "model.onnx")
    if cfg.weights: write_weights(learn, run / "model.safetensors")
    if cfg.space: write_space(run, cfg.space)
    if cfg.push is not None: push_space(run, cfg.push)
    return run / "learner.pkl"


def main(args=None):
    with one_line_errors():
        cfg = cli(ExportConfig, args, "export.py")
        quiet_imports()
        log_to_screen()
        log.info("Next: %s", command("app.py", "--model", export(cfg)))


if __name__ == "__main__": main()
