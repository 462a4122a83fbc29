#!/usr/bin/env python
"""Turn a finished run into one learner file: python export.py runs/cifar100/RUN"""
import os
import sys
from pathlib import Path

from sifar.errors import UserError, one_line_errors
from sifar.terminal import log, log_to_screen, quiet_imports


def export(run):
    "Write the learner of `run` to its learner.pkl, which fastai's load_learner reads; returns the path."
    from sifar.callbacks import Precision
    from sifar.learner import load_run

    if not (Path(run) / "metrics.json").is_file(): raise UserError(f"{run} is not a finished run: it has no metrics.json.")
    learn = load_run(run)
    learn.remove_cb(Precision)                      # what this machine is fast at says nothing about the next
    tmp, path = learn.path / "learner.pkl.tmp", learn.path / "learner.pkl"
    try:
        learn.export(tmp.name)
        os.replace(tmp, path)
    except RuntimeError as e: raise UserError(f"{path} cannot be written: is the disk full?") from e       # what torch.save makes of it
    finally: tmp.unlink(missing_ok=True)
    return path


def main(args):
    with one_line_errors():
        if len(args) != 1 or args[0].startswith("-"): raise UserError("usage: python export.py RUN, where RUN is a finished run folder such as runs/cifar100/<time>-resnet18")
        quiet_imports()
        log_to_screen()
        path = export(args[0])
        log.info('%s is written: fastai.learner.load_learner("%s").predict("picture.png")', path, path)


if __name__ == "__main__": main(sys.argv[1:])
