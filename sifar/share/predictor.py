"""An exported learner put to use: any image in, labels and probabilities out."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fastai.data.transforms import Normalize
from fastcore.all import chunked, first
from torch import nn
from torch.nn import functional as F

from ..data.image import read_image
from ..errors import UserError
from ..training.precision import pick_device
from ..training.recipe import load_learner


class Classifier(nn.Module):
    "`model` with its normalisation and softmax: images (n,sz,sz,3) uint8 -> probabilities (n,c)."

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalize(self, x): return (x.permute(0, 3, 1, 2).float().div(255) - self.mean) / self.std
    def forward(self, x): return self.model(self.normalize(x)).softmax(1)


def get_classifier(learn):
    "The Classifier in a learner, ready to predict, and the side of its images."
    normalize = first(o for o in learn.dls.valid.after_batch.fs if isinstance(o, Normalize))
    classifier = Classifier(learn.model, normalize.mean.cpu(), normalize.std.cpu()).eval()
    return classifier, learn.dls.valid.dataset.tls[0].tfms[0].sz


def check_positive(name, n):
    if not isinstance(n, int) or n < 1: raise UserError(f"{name} is {n!r}, but should be 1 or more.")


class Predictor:
    """The learner file `path`, made by export.py, as a classifier of images.

    device: auto, cpu, cuda, cuda:N or mps. An image is a path, the bytes of an image file, a Pillow image or an array (h,w), (h,w,3) or (h,w,4): integers, or floats from 0 to 1.
    Errors: UserError for a file that is no learner, and for an image that cannot be read."""

    def __init__(self, path, device="auto"):
        learn = load_learner(path)
        self.vocab, self.superclasses = list(learn.dls.vocab), learn.dls.data.superclasses
        self.classifier, self.sz = get_classifier(learn)
        self.device = pick_device(device)
        self.classifier.to(self.device, memory_format=torch.channels_last)

    def read(self, image, *limits):
        "What the model sees of an image, as a Pillow image of `sz` x `sz` pixels; `limits` are those of `read_image`."
        return read_image(image, self.sz, *limits)

    def tensor(self, images): return torch.from_numpy(np.stack([np.asarray(o) for o in images])).to(self.device)

    @torch.inference_mode()
    def probs(self, images):
        "The probabilities (n,c) of images that `read` gave, or of an array (n,sz,sz,3) uint8."
        return self.classifier(self.tensor(images)).cpu()

    def top(self, probs, k):
        "For each row of `probs` a list of the `k` likeliest (label, probability)."
        check_positive("k", k)
        p, i = probs.topk(min(k, len(self.vocab)))
        return [[(self.vocab[c], v) for c, v in zip(*o)] for o in zip(i.tolist(), p.tolist())]

    def predict(self, image, k=5):
        "The `k` likeliest classes of an image as a list of (label, probability), the likeliest first."
        return self.top(self.probs([self.read(image)]), k)[0]

    def predict_each(self, images, k=5, bs=64):
        "Yields for each of `images`, any iterable, what `predict` gives, or the UserError that it raises; `bs` of them are in memory at once."
        check_positive("bs", bs)

        def read(image):
            try: return self.read(image)
            except UserError as e: return e
        with ThreadPoolExecutor() as pool:
            for batch in chunked(images, bs):
                seen = list(pool.map(read, batch))
                good = [o for o in seen if not isinstance(o, UserError)]
                tops = iter(self.top(self.probs(good), k) if good else [])
                yield from (o if isinstance(o, UserError) else next(tops) for o in seen)

    def predict_batch(self, images, k=5, bs=64):
        "As `predict`, for each of `images`, a list or any iterable; `bs` of them are in memory at once."
        if isinstance(images, (str, bytes, Path)): raise UserError("predict_batch takes a list of images; predict takes one.")
        tops = []
        for o in self.predict_each(images, k, bs):
            if isinstance(o, UserError): raise o
            tops.append(o)
        return tops

    def heat_map(self, image, label):
        """Where in an image the model finds `label`: Grad-CAM (sz,sz) from 0 to 1, None for a model without a grid of features.

        https://arxiv.org/abs/1610.02391"""
        model = self.classifier.model
        if not hasattr(model, "forward_features"): return None
        features = model.forward_features(self.classifier.normalize(self.tensor([self.read(image)])))
        if features.ndim != 4 or features.shape[1] != getattr(model, "num_features", None): return None
        score = model.forward_head(features)[0, self.vocab.index(label)]
        grad, = torch.autograd.grad(score, features)
        cam = F.relu((grad.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).detach())
        cam = F.interpolate(cam / cam.max().clamp_min(1e-12), (self.sz, self.sz), mode="bilinear")
        return cam[0, 0].cpu().numpy()
