#!/usr/bin/env python
"""Train a classifier on CIFAR-100, CIFAR-10, digits or a folder of images: python train.py --dataset cifar100"""
import tempfile
from dataclasses import replace

from sifar.config import parse_args
from sifar.errors import one_line_errors
from sifar.terminal import command, log, log_to_screen, progress, quiet_imports


def train(cfg):
    "Train, choose on valid, test once: everything goes into the run folder."
    from sifar.dataloaders import get_dls
    from sifar.learner import check_machine, get_learner, resume, run_callbacks
    from sifar.report import write_metrics
    from sifar.runs import describe_run, open_run

    with open_run(cfg) as run:
        check_machine(cfg)
        dls = get_dls(cfg)
        learn = get_learner(dls, cfg, path=run)
        with learn.no_bar(), progress() as bar:
            cbs = run_callbacks(learn, cfg, bar)
            start = resume(learn, cbs) if cfg.resume else 0
            describe_run(run, cfg, learn)
            learn.fit_warmup_cosine(cfg.epochs, warmup=cfg.warmup * cfg.epochs, start_epoch=start, cbs=cbs, fall=cfg.schedule)
        write_metrics(learn, cfg)
    return run


def main(args=None):
    with one_line_errors():
        cfg = parse_args(args)
        quiet_imports()
        log_to_screen()
        if cfg.dry_run: return dry_run(cfg)
        run = train(cfg)
        log.info("Next: %s", command("train.py", "--dataset", "cifar100") if cfg.dataset == "digits" else command("export.py", run))


def dry_run(cfg):
    "One batch through everything, in a folder that is deleted afterwards."
    with tempfile.TemporaryDirectory() as runs: train(replace(cfg, epochs=1, runs=runs, name=None, resume=None))
    log.info("The dry run went through; no run folder was kept.")


if __name__ == "__main__": main()
