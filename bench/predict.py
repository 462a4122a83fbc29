"""What a prediction costs beside the bare forward pass of its model, and beside fastai's learn.predict.

    python -m bench.predict                     # ResNet-18, 32x32 pixels, float32

All take turns on the same images; the medians of the rounds count, and those of the ratios within a round."""
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from sifar import Predictor, TrainConfig, get_dls, get_learner, load_learner
from sifar.log import quiet_imports
from sifar.share.export import some_images, write_learner

ONE, BATCH = 20, 64         # single predictions a round, images of a batch


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def rounds(*fs, n=12):
    "The seconds of each of `fs`, taking turns, in `n` rounds after a first one that does not count."
    return [[seconds(f) for f in fs] for _ in range(n + 1)][1:]


def main():
    quiet_imports()
    cfg = TrainConfig(dataset="digits", device="cpu")
    learn = get_learner(get_dls(cfg), cfg)
    images = [Image.fromarray(o) for o in some_images(learn, BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        write_learner(learn, Path(folder) / "learner.pkl", {})
        predictor, learn = Predictor(folder, "cpu"), load_learner(folder)
    model, x = predictor.classifier.model, predictor.classifier.normalize(predictor.tensor(images)).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare(n, bs): return [model(x[:bs]) for _ in range(n)]

    with learn.no_bar():
        one = rounds(lambda: bare(ONE, 1), lambda: [predictor.predict(images[0]) for _ in range(ONE)], lambda: [learn.predict(images[0]) for _ in range(ONE)])
        many = rounds(lambda: bare(1, BATCH), lambda: predictor.predict_batch(images))
    ms = [1000 * statistics.median(o) / ONE for o in zip(*one)]
    per_second = [BATCH / statistics.median(o) for o in zip(*many)]
    print(f"one image: bare forward {ms[0]:.2f} ms, Predictor.predict {ms[1]:.2f} ms ({statistics.median(b / a for a, b, _ in one):.2f} times), "
          f"learn.predict {ms[2]:.2f} ms ({statistics.median(c / a for a, _, c in one):.2f} times)")
    print(f"{BATCH} images: bare forward {per_second[0]:.0f} images/s, Predictor.predict_batch {per_second[1]:.0f} ({statistics.median(a / b for a, b in many):.2f} times), "
          f"learn.predict one after another {1000 / ms[2]:.0f}")


if __name__ == "__main__": main()
