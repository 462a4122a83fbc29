"""TensorBoard and Weights & Biases, by fastai's own callbacks."""
from contextlib import contextmanager
from dataclasses import asdict

from ..errors import UserError, one_line


def trackers(learn, cfg):
    """fastai's callbacks for TensorBoard and Weights & Biases, where `cfg` asks for them.

    Errors: UserError where the package is missing, or Weights & Biases does not start."""
    cbs = []
    if cfg.tensorboard: cbs.append(tensorboard_callback(learn.path / "tensorboard"))
    if cfg.wandb: cbs.append(wandb_callback(learn.path, cfg))
    return cbs


@contextmanager
def needed_by(flag):
    "A package that cannot be imported here becomes a UserError that says how to install it."
    try: yield
    except ImportError as e:
        what = f"{flag} needs a package that is not installed"
        raise UserError(f"{what}: pip install {e.name}") from e


def tensorboard_callback(folder):
    """fastai's TensorBoardCallback, which of the optimizer logs lr alone.

    torch's optimizers have settings that are not numbers."""
    with needed_by("--tensorboard"):
        from fastai.callback.tensorboard import TensorBoardCallback

    class TensorBoard(TensorBoardCallback):
        def after_batch(self):          # in place of fastai's, which logs all settings
            if not self.training: return
            self.writer.add_scalar("train_loss", self.smooth_loss, self.train_iter)
            self.writer.add_scalar("lr", self.opt.hypers[-1]["lr"], self.train_iter)
    return TensorBoard(folder, trace_model=False, log_preds=False)


def wandb_callback(run, cfg):
    """fastai's WandbCallback for the run folder `run`.

    W&B gets the settings from here: fastai asks the learner for them, and cannot read those of
    torch's optimizers."""
    with needed_by("--wandb"):
        import wandb
        from fastai.callback.wandb import WandbCallback

    class Wandb(WandbCallback):
        def before_fit(self):
            # hides the learner's own method: there is nothing to gather
            self.learn.gather_args = dict
            super().before_fit()
            del self.learn.gather_args
    # reinit: each of several seeds in this process is a run of its own
    try: wandb.init(project="sifar", name=run.name, dir=run, config=asdict(cfg), reinit="finish_previous")
    except wandb.Error as e:
        why = one_line(e, 200)
        what_to_do = "run `wandb login`, or set WANDB_MODE=offline"
        raise UserError(f"Weights & Biases did not start ({why}): {what_to_do}.") from e
    return Wandb(log_preds=False, log_model=False)
