"""TensorBoard and Weights & Biases, by fastai's own callbacks."""
from dataclasses import asdict

from ..errors import UserError, one_line


def trackers(learn, cfg):
    "fastai's callbacks for TensorBoard and Weights & Biases, where `cfg` asks for them. Errors: UserError where the package is missing."
    try:
        if cfg.tensorboard: yield tensorboard_callback(learn.path / "tensorboard")
        if cfg.wandb: yield wandb_callback(learn.path, cfg)
    except ImportError as e: raise UserError(f"--{'tensorboard' if 'tensorboard' in str(e) else 'wandb'} needs a package that is not installed: pip install {e.name}") from e


def tensorboard_callback(folder):
    "fastai's TensorBoardCallback, which of the optimizer logs lr alone: torch's have settings that are no numbers."
    from fastai.callback.tensorboard import TensorBoardCallback

    class TensorBoard(TensorBoardCallback):
        def after_batch(self):
            if not self.training: return
            self.writer.add_scalar("train_loss", self.smooth_loss, self.train_iter)
            self.writer.add_scalar("lr", self.opt.hypers[-1]["lr"], self.train_iter)
    return TensorBoard(folder, trace_model=False, log_preds=False)


def wandb_callback(run, cfg):
    "fastai's WandbCallback for the run folder `run`; W&B gets the settings from here, as fastai cannot read those of torch's optimizers."
    import wandb
    from fastai.callback.wandb import WandbCallback

    class Wandb(WandbCallback):
        def before_fit(self):
            self.learn.gather_args = dict
            super().before_fit()
            del self.learn.gather_args
    try: wandb.init(project="sifar", name=run.name, dir=run, config=asdict(cfg), reinit="finish_previous")
    except wandb.Error as e: raise UserError(f"Weights & Biases did not start ({one_line(e, 200)}): run `wandb login`, or set WANDB_MODE=offline.") from e
    return Wandb(log_preds=False, log_model=False)
