"""An exported learner put to use: any image in, labels and probabilities out."""
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.image import VIEWS, fit_views, read_image, read_rgb
from ..errors import UserError
from ..runs.calibration import EPS, judge, with_temperature

UNSURE = 0.5        # without a confidence, a model is sure of what is at least as likely


class Answer(NamedTuple):
    "What a model says of a picture: its likeliest (label, probability), and sure, unsure or unknown."
    top: list
    verdict: str


def check_positive(name, n):
    if not isinstance(n, int) or n < 1: raise UserError(f"{name} is {n!r}, but should be 1 or more.")


class Predictor:
    """The file `path`, made by export.py, as a classifier of images: a learner, or an ONNX model.

    device: auto, cpu, cuda, cuda:N or mps.
    views: how many views of a picture are looked at: 1; 2, which is better on photographs; or 4, those and
    their mirror images, which is better still (of a model that was trained without these, it is 2).
    An image is a path, the bytes of an image file, a Pillow image or an array (h,w), (h,w,3) or
    (h,w,4): integers, or floats from 0 to 1.
    Errors: UserError for a file that is no learner, and for an image that cannot be read."""

    def __init__(self, path, device="auto", views=1):
        if views not in VIEWS: raise UserError(f"views is {views!r}, but should be 1, 2 or 4.")
        self.model = load_model(Path(path), device)
        self.views = 2 if views == 4 and self.model.about.get("mirror") is False else views
        self.vocab, self.superclasses = self.model.vocab, self.model.superclasses
        self.sz, self.fit = self.model.sz, self.model.fit
        self.confidence = self.model.about.get("confidence")
        check_confidence(self.confidence)

    def read(self, image):
        "What the model sees of an image, as a Pillow image of `sz` x `sz` pixels."
        return read_image(image, self.sz, self.fit)

    def read_views(self, image): return fit_views(read_rgb(image), self.sz, self.views, self.fit)

    def probs(self, images):
        "The probabilities, an array (n,c), of images that `read` gave, or of an array (n,sz,sz,3) uint8."
        return self.model.probs(np.stack([np.asarray(img) for img in images]))

    def probs_of_views(self, seen):
        "The probabilities (n,c) of pictures, each a list of as many views: of the mean of their logits."
        if self.views == 1: return self.probs([view for view, in seen])
        probs = self.probs([view for views in seen for view in views])
        # log(probs) are the logits, less one number for each row, which the sum takes out again
        means = np.exp(np.log(probs + EPS).reshape(len(seen), self.views, -1).mean(1))
        return means / means.sum(1, keepdims=True)

    def top(self, probs, k):
        "For each row of `probs` a list of the `k` likeliest (label, probability)."
        check_positive("k", k)
        best = np.argsort(-probs, axis=1, kind="stable")[:, :k]         # (n,k), the likeliest first
        return [[(self.vocab[c], float(row[c])) for c in classes] for row, classes in zip(probs, best)]

    def predict(self, image, k=5):
        "The `k` likeliest classes of an image as a list of (label, probability), the likeliest first."
        return self.top(self.probs_of_views([self.read_views(image)]), k)[0]

    def answer(self, image, k=5):
        """An Answer: the `k` likeliest labels of an image, and whether to trust them.

        Its probabilities are those of the temperature that the export has found."""
        probs = self.probs_of_views([self.read_views(image)])
        if not self.confidence:
            verdict = "sure" if probs.max() >= UNSURE else "unsure"
            return Answer(self.top(probs, k)[0], verdict)
        tempered = with_temperature(probs, self.confidence["temperature"])
        return Answer(self.top(tempered, k)[0], str(judge(probs, self.confidence)[0]))

    def predict_each(self, images, k=5, bs=64):
        """Yields for each of `images`, any iterable, what `predict` gives, or the UserError it raises.

        `bs` of them are in memory at once."""
        check_positive("bs", bs)

        def read(image):
            try: return self.read_views(image)
            except UserError as e: return e
        images = iter(images)
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(images, bs)):
                seen = list(pool.map(read, batch))
                good = [views for views in seen if not isinstance(views, UserError)]
                tops = iter(self.top(self.probs_of_views(good), k)) if good else iter([])
                for views in seen: yield views if isinstance(views, UserError) else next(tops)

    def predict_batch(self, images, k=5, bs=64):
        "As `predict`, for each of `images`, any iterable; `bs` of them are in memory at once."
        if isinstance(images, (str, bytes, Path)):
            raise UserError("predict_batch takes a list of images; predict takes one.")
        tops = []
        for top in self.predict_each(images, k, bs):
            if isinstance(top, UserError): raise top
            tops.append(top)
        return tops

    def heat_map(self, image, label):
        "Where in an image the model finds `label`: (sz,sz) from 0 to 1. None where it cannot tell."
        return self.model.heat_map(np.array(self.read(image)), self.vocab.index(label))


def load_model(path, device):
    "The model in the file `path`: a .onnx, else a learner; only that needs torch. Errors: UserError."
    if path.suffix == ".onnx":
        from .light import OnnxModel
        return OnnxModel(path)
    from .classifier import LearnerModel
    return LearnerModel(path, device)


def check_confidence(o):
    "Raise a UserError for what is no dictionary as `fit_confidence` gives, or None."
    if o is None: return
    try:
        figures = [o[k] for k in ("temperature", "threshold", "sure")]
        ok = all(math.isfinite(figure) for figure in figures) and 0.01 <= figures[0] <= 100
    except (TypeError, KeyError, OverflowError): ok = False
    if not ok: raise UserError("The model.json is damaged, its confidence is none: export the run again.")
