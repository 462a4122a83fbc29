"""What a prediction costs beside the bare forward pass of its model, and beside fastai's learn.predict.

    python -m bench.predict                     # ResNet-18, 32x32 pixels, float32

All take turns on the same images; the medians of the rounds count, and those of the ratios within a round."""
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
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


def times(rounds, i, j):
    "How many times as long number `i` took as number `j`, the median of the rounds."
    return statistics.median(taken[i] / taken[j] for taken in rounds)


def main():
    quiet_imports()
    cfg = TrainConfig(dataset="digits", device="cpu")
    learn = get_learner(get_dls(cfg), cfg)
    images = [Image.fromarray(image) for image in some_images(learn, BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        write_learner(learn, Path(folder) / "learner.pkl", {})
        predictor, learn = Predictor(folder, "cpu"), load_learner(folder)
    classifier = predictor.model.classifier
    model = classifier.model
    x = classifier.normalize(torch.from_numpy(np.stack(images)))            # (BATCH,3,32,32)
    x = x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare(n, bs):
        for _ in range(n): model(x[:bs])

    def ours():
        for _ in range(ONE): predictor.predict(images[0])

    def fastai():
        for _ in range(ONE): learn.predict(images[0])

    with learn.no_bar():
        one = rounds(lambda: bare(ONE, 1), ours, fastai)
        many = rounds(lambda: bare(1, BATCH), lambda: predictor.predict_batch(images))
    a, b, c = (1000 * statistics.median(taken) / ONE for taken in zip(*one))
    print(f"one image: bare forward {a:.2f} ms, "
          f"Predictor.predict {b:.2f} ms ({times(one, 1, 0):.2f} times), "
          f"learn.predict {c:.2f} ms ({times(one, 2, 0):.2f} times)")
    all_at_once, ours_at_once = (BATCH / statistics.median(taken) for taken in zip(*many))
    print(f"{BATCH} images: bare forward {all_at_once:.0f} images/s, "
          f"Predictor.predict_batch {ours_at_once:.0f} ({times(many, 0, 1):.2f} times), "
          f"learn.predict one after another {1000 / c:.0f}")


if __name__ == "__main__": main()
