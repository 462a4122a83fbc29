#!/usr/bin/env python
"""One learner file of a finished run, and a Space that shows it: python export.py runs/cifar100/RUN"""
from pathlib import Path

from sifar.cli import Parser, one_line_errors
from sifar.errors import UserError
from sifar.log import command, log, log_to_screen


def export(cfg):
    "Write what `cfg` asks for; returns the path of the learner file."
    from sifar.runs.run import newest_run
    run = cfg.run or newest_run()
    from sifar.share.export import check_onnx, export_run, write_onnx, write_weights  # fastai: takes seconds
    from sifar.share.space import check_folder, check_push, push_space, write_space

    # what cannot work fails before the work, and leaves an earlier export as it is
    if cfg.light and not cfg.space and cfg.push is None:
        raise UserError("--light is a kind of Space: name one by --space or --push.")
    if cfg.onnx or cfg.light: check_onnx()
    if cfg.space: check_folder(cfg.space)
    if cfg.push is not None: check_push(cfg.push)
    learn = export_run(run)
    if cfg.onnx or cfg.light: write_onnx(learn, run / "model.onnx")
    if cfg.weights: write_weights(learn, run / "model.safetensors")
    if cfg.space: write_space(run, cfg.space, cfg.light)
    if cfg.push is not None: push_space(run, cfg.push, cfg.light)
    return run / "learner.pkl"


def main(args=None):
    parser = Parser(
        "export.py", "Write the learner.pkl and the model.json of a finished run into its folder, "
                     "and what else is named.")
    parser.add_argument("run", type=Path, nargs="?",
                        help="run folder; else the run that was finished last")
    parser.add_argument("--onnx", action="store_true",
                        help="also write model.onnx: images uint8 in, probabilities out")
    parser.add_argument("--weights", action="store_true", help="also write model.safetensors")
    parser.add_argument("--space", type=Path, metavar="FOLDER",
                        help="also write a complete Hugging Face Space into this folder")
    parser.add_argument("--light", action="store_true",
                        help="let the Space compute by ONNX Runtime, without PyTorch and fastai")
    parser.add_argument("--push", metavar="USER/NAME",
                        help="upload the Space to USER/NAME on Hugging Face")
    with one_line_errors():
        cfg = parser.parse_args(args)
        log_to_screen()
        log.info("Next: %s", command("app.py", "--model", export(cfg)))


if __name__ == "__main__": main()
