#!/usr/bin/env python
"""Train a classifier on CIFAR-100, CIFAR-10, digits or your own images: python train.py"""
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from sifar.cli import one_line_errors, without_flags
from sifar.config import flag
from sifar.errors import name_batch_size
from sifar.log import command, log, log_to_screen, progress, say_once

# What takes seconds to import is imported where it is used: --help and wrong flags are answered at once.


def train(cfg, args):
    "Train, choose on valid, test once: all goes into the run folder, the command line `args` too."
    from sifar.runs.check import say_twins
    from sifar.runs.load import resume
    from sifar.runs.report import write_report
    from sifar.runs.start import describe_run, open_run
    from sifar.training.explore import settle_lr
    from sifar.training.learner import check_machine, get_learner, run_callbacks, settled_dls
    from sifar.training.ranks import share_weights

    with open_run(cfg) as run:
        check_machine(cfg)
        cfg, dls = settled_dls(cfg)
        say_twins(cfg, dls.data)
        cfg = settle_lr(cfg, dls, run)
        learn = get_learner(dls, cfg, path=run, start=not cfg.resume)
        with learn.no_bar(), progress() as bar:
            cbs = run_callbacks(learn, cfg, bar)
            start = resume(learn, cbs) if cfg.resume else 0
            describe_run(run, cfg, learn, args)
            warmup = cfg.warmup * cfg.epochs
            learn.fit_warmup_cosine(
                cfg.epochs, warmup=warmup, start_epoch=start, cbs=cbs, fall=cfg.schedule)
        share_weights(learn.model)
        write_report(learn, cfg, learn.history)
    return run


def main(args=None):
    with one_line_errors():
        log_to_screen()
        from sifar.runs.arguments import parse_args
        cfg = parse_args(args)
        from sifar.training.ranks import joined
        with joined(cfg.device): do(cfg, sys.argv[1:] if args is None else args)


def do(cfg, args):
    "What the settings `cfg` ask for; `args` is the command line."
    if cfg.dry_run: return dry_run(cfg, args)
    if cfg.lr_find or cfg.show_batch or cfg.profile: return explore(cfg, args)
    if cfg.seeds > 1: return train_seeds(cfg, args)
    run = train(cfg, args)
    # after the small data set the large one, after that the learner
    if cfg.dataset == "digits": log.info("Next: %s", command("train.py", "--dataset", "cifar100"))
    else: log.info("Next: %s", command("export.py", run))


def dry_run(cfg, args):
    "One batch through everything, in a folder that is deleted afterwards."
    with tempfile.TemporaryDirectory() as runs:
        train(replace(cfg, epochs=1, runs=runs, name=None, resume=None, wandb=False), args)
    log.info("The dry run went through; no run folder was kept.")


def explore(cfg, args):
    "Look before training; what is to be seen goes into RUNS/DATASET/explore."
    from sifar.training.explore import explore
    from sifar.training.learner import check_machine, settled_dls

    check_machine(cfg)
    with name_batch_size(cfg):
        cfg, dls = settled_dls(cfg)
        found = explore(cfg, dls, explore_folder(cfg))
    if not found: return
    others = without_flags(args, "lr_find", "show_batch", "profile", "lr")
    lr = f"{found['valley']:.2g}"
    log.info("To train with the valley: %s", command("train.py", *others, "--lr", lr))


def explore_folder(cfg): return Path(cfg.runs) / Path(cfg.dataset).name / "explore"


def train_seeds(cfg, args):
    "Train a run for each seed, then say the mean of their results; `args` is the command line."
    from sifar.runs.compare import means, read_run
    from sifar.runs.start import check_free, run_path
    from sifar.training.learner import check_machine

    check_machine(cfg)
    cfg = replace(cfg, name=run_path(cfg).name)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    todo = [replace(cfg, seed=seed, seeds=1, name=f"{cfg.name}-{seed}") for seed in seeds]
    for one in todo: check_free(run_path(one))
    say_once()
    shared = choices(cfg)
    runs = []
    for one in todo:
        try: runs.append(train(replace(one, **shared), args))
        except (KeyboardInterrupt, SystemExit):
            # a run with a checkpoint goes on by its own --resume; of one without, nothing is left
            resumable = (run_path(one) / "models" / "last.pth").exists()
            say_other_seeds(cfg, args, one.seed + resumable, shared)
            raise
    for line in means([read_run(run) for run in runs]): log.info("%s", line)


def choices(cfg):
    "What auto stands for in --arch, --mirror and --lr: one for all seeds, so that runs differ in seed alone."
    from sifar.training.explore import settle_lr
    from sifar.training.learner import settled_dls

    auto = [name for name in ("arch", "mirror", "lr") if getattr(cfg, name) == "auto"]
    if not auto: return {}
    with name_batch_size(cfg):
        cfg, dls = settled_dls(cfg)
        cfg = settle_lr(cfg, dls, explore_folder(cfg))
    return {name: getattr(cfg, name) for name in auto}


def say_other_seeds(cfg, args, first, shared):
    "Say how to train the seeds from `first` on, where there are any, with the settings `shared`."
    if first >= cfg.seed + cfg.seeds: return
    log.info("Then train the other seeds, and let python -m sifar.compare say the mean:")
    log.info("  %s", other_seeds(cfg, args, first, shared))


def other_seeds(cfg, args, seed, shared):
    "The command that trains the seeds from `seed` on, with the settings `shared`."
    left = cfg.seed + cfg.seeds - seed
    changed = ["seed", "seeds", "name", *shared]
    flags = [o for k, v in {**shared, "seed": seed}.items() for o in (flag(k), v)]
    if left > 1: flags += ["--seeds", left, "--name", cfg.name]
    else: flags += ["--name", f"{cfg.name}-{seed}"]
    return command("train.py", *without_flags(args, *changed), *flags)


if __name__ == "__main__": main()
