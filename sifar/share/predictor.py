"""An exported learner put to use: any image in, labels and probabilities out."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fastai.data.transforms import Normalize
from fastcore.all import chunked, first
from torch import nn
from torch.nn import functional as F

from ..data.image import VIEWS, read_image, read_views
from ..errors import UserError
from ..training.precision import pick_device
from ..training.recipe import load_learner


class Classifier(nn.Module):
    "`model` between normalisation and softmax: images (n,sz,sz,3) uint8 -> probabilities (n,c)."

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalize(self, x):
        x = x.permute(0, 3, 1, 2).float() / 255             # (n,h,w,3) -> (n,3,h,w)
        return (x - self.mean) / self.std

    def logits(self, x): return self.model(self.normalize(x))

    def forward(self, x): return self.logits(x).softmax(1)


def get_classifier(learn):
    "The Classifier in a learner, ready to predict, and the side of its images."
    normalize = first(tfm for tfm in learn.dls.valid.after_batch.fs if isinstance(tfm, Normalize))
    classifier = Classifier(learn.model, normalize.mean.cpu(), normalize.std.cpu()).eval()
    read_image = learn.dls.valid.dataset.tls[0].tfms[0]         # ReadImage, of the list of images
    return classifier, read_image.sz


def check_positive(name, n):
    if not isinstance(n, int) or n < 1: raise UserError(f"{name} is {n!r}, but should be 1 or more.")


class Predictor:
    """The learner file `path`, made by export.py, as a classifier of images.

    device: auto, cpu, cuda, cuda:N or mps.
    views: how many views of a picture are looked at: 1; 2, which is better on photographs; or 4, those and
    their mirror images, which is better still where these are of the same class.
    An image is a path, the bytes of an image file, a Pillow image or an array (h,w), (h,w,3) or
    (h,w,4): integers, or floats from 0 to 1.
    Errors: UserError for a file that is no learner, and for an image that cannot be read."""

    def __init__(self, path, device="auto", views=1):
        if views not in VIEWS: raise UserError(f"views is {views!r}, but should be 1, 2 or 4.")
        self.views = views
        learn = load_learner(path)
        self.vocab, self.superclasses = list(learn.dls.vocab), learn.dls.data.superclasses
        self.classifier, self.sz = get_classifier(learn)
        self.device = pick_device(device)
        self.classifier.to(self.device, memory_format=torch.channels_last)

    def read(self, image, *limits):
        """What the model sees of an image, as a Pillow image of `sz` x `sz` pixels.

        limits: those of `read_image`."""
        return read_image(image, self.sz, *limits)

    def tensor(self, images):
        "The images as one tensor (n,sz,sz,3) uint8 on the device."
        return torch.from_numpy(np.stack([np.asarray(img) for img in images])).to(self.device)

    @torch.inference_mode()
    def probs(self, images):
        "The probabilities (n,c) of images that `read` gave, or of an array (n,sz,sz,3) uint8."
        return self.classifier(self.tensor(images)).cpu()

    @torch.inference_mode()
    def probs_of_views(self, seen):
        "The probabilities (n,c) of pictures, each a list of as many views: of the mean of their logits."
        views = [view for views in seen for view in views]
        logits = self.classifier.logits(self.tensor(views))                     # (n*views,c)
        return logits.view(len(seen), self.views, -1).mean(1).softmax(1).cpu()

    def top(self, probs, k):
        "For each row of `probs` a list of the `k` likeliest (label, probability)."
        check_positive("k", k)
        best, classes = probs.topk(min(k, len(self.vocab)))         # (n,k) each, the likeliest first
        tops = []
        for row, ps in zip(classes.tolist(), best.tolist()):
            tops.append([(self.vocab[c], p) for c, p in zip(row, ps)])
        return tops

    def predict(self, image, k=5):
        "The `k` likeliest classes of an image as a list of (label, probability), the likeliest first."
        return self.top(self.probs_of_views([read_views(image, self.sz, self.views)]), k)[0]

    def predict_each(self, images, k=5, bs=64):
        """Yields for each of `images`, any iterable, what `predict` gives, or the UserError it raises.

        `bs` of them are in memory at once."""
        check_positive("bs", bs)

        def read(image):
            try: return read_views(image, self.sz, self.views)
            except UserError as e: return e
        with ThreadPoolExecutor() as pool:
            for batch in chunked(images, bs):
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
        """Where in an image the model finds `label`: Grad-CAM (sz,sz) from 0 to 1.

        None for a model that has no grid of features.

        https://arxiv.org/abs/1610.02391"""
        model = self.classifier.model
        if not hasattr(model, "forward_features"): return None
        x = self.classifier.normalize(self.tensor([self.read(image)]))
        features = model.forward_features(x)                # (1,channels,h,w), of a grid
        if features.ndim != 4 or features.shape[1] != getattr(model, "num_features", None): return None
        score = model.forward_head(features)[0, self.vocab.index(label)]
        grad, = torch.autograd.grad(score, features)
        # each channel counts as much as the score grows with it, on average over the grid;
        # relu: what speaks against the label is not shown
        weights = grad.mean((2, 3), keepdim=True)           # (1,channels,1,1)
        cam = F.relu((weights * features).sum(1, keepdim=True).detach())        # (1,1,h,w)
        cam = cam / cam.max().clamp_min(1e-12)
        return F.interpolate(cam, (self.sz, self.sz), mode="bilinear")[0, 0].cpu().numpy()
