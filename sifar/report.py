"""A finished run in figures: metrics.json."""
import json
from datetime import timedelta

from .files import write_file
from .terminal import log


def evaluate(learn, ds_idx):
    "Loss (label-smoothed), top-1 and top-5 accuracy as fractions on `learn.dls[ds_idx]`; None where that is empty."
    if not len(learn.dls[ds_idx]): return None
    with learn.no_bar(): return dict(zip(("loss", "top1", "top5"), learn.validate(ds_idx)))


def write_metrics(learn, cfg):
    """Evaluate the test set, once, write metrics.json and say what came out.

    The valid figures are those of the epoch that was chosen on them."""
    history = learn.history
    valid = [o for o in history if o["top1"] is not None]
    best = max(valid, key=lambda o: o["top1"]) if valid else None
    metrics = {
        "dataset": cfg.dataset, "arch": cfg.arch, "classes": learn.dls.c, "parameters": sum(o.numel() for o in learn.model.parameters()),
        "valid": {"loss": best["valid_loss"], "top1": best["top1"], "top5": best["top5"]} if best else None,
        "test": evaluate(learn, 2),
        "best_epoch": best["epoch"] if best else None, "epochs": cfg.epochs, "seed": cfg.seed,
        "seconds": round(sum(o["seconds"] for o in history), 1),
        "images_per_second": round(sum(o["images_per_second"] for o in history) / len(history), 1),
        "images": {o: len(getattr(learn.dls.data, o)) for o in ("train", "valid", "test")},
    }
    write_file(learn.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for split in ("valid", "test"):
        if o := metrics[split]: log.info("%-5s  top-1 %.2f %%  top-5 %.2f %%  loss %.4f", split, 100 * o["top1"], 100 * o["top5"], o["loss"])
        else: log.info("%-5s  no images, so no figures", split)
    log.info("%d epochs in %s, %.0f images/s; all of it is in %s", cfg.epochs, timedelta(seconds=round(metrics["seconds"])),
             metrics["images_per_second"], learn.path)
