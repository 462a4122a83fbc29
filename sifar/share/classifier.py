"""The model of a learner file as a function of pixels, and where it looks."""
from pathlib import Path

import torch
from fastai.data.transforms import Normalize
from fastcore.all import first
from torch import nn
from torch.nn import functional as F

from ..files import read_about
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

    def features(self, x):
        "The grid of features (n,c,h,w) that the head of the model gets of images; None where there is none."
        if not hasattr(self.model, "forward_features"): return None
        features = self.model.forward_features(self.normalize(x))
        is_grid = features.ndim == 4 and features.shape[1] == getattr(self.model, "num_features", None)
        return features if is_grid else None

    def forward(self, x): return self.model(self.normalize(x)).softmax(1)


def get_classifier(learn):
    "The Classifier in a learner, ready to predict, the side of its images, and how they become square."
    normalize = first(tfm for tfm in learn.dls.valid.after_batch.fs if isinstance(tfm, Normalize))
    classifier = Classifier(learn.model, normalize.mean.cpu(), normalize.std.cpu()).eval()
    read_image = learn.dls.valid.dataset.tls[0].tfms[0]         # ReadImage, of the list of images
    return classifier, read_image.sz, read_image.fit


class LearnerModel:
    "The model in the learner file `path`, on a device: auto, cpu, cuda, cuda:N or mps. Errors: UserError."

    def __init__(self, path, device):
        path = Path(path) / "learner.pkl" if Path(path).is_dir() else Path(path)
        learn = load_learner(path)
        self.vocab, self.superclasses = list(learn.dls.vocab), learn.dls.data.superclasses
        self.classifier, self.sz, self.fit = get_classifier(learn)
        self.about = read_about(path)
        self.device = pick_device(device)
        self.classifier.to(self.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def probs(self, images):
        "The probabilities (n,c) of images (n,sz,sz,3) uint8, both as arrays."
        return self.classifier(torch.from_numpy(images).to(self.device)).cpu().numpy()

    def heat_map(self, image, c):
        """Where in an image (sz,sz,3) the model finds class number `c`: Grad-CAM (sz,sz) from 0 to 1.

        None for a model that has no grid of features.

        https://arxiv.org/abs/1610.02391"""
        features = self.classifier.features(torch.from_numpy(image[None]).to(self.device))   # (1,k,h,w)
        if features is None: return None
        score = self.classifier.model.forward_head(features)[0, c]
        grad, = torch.autograd.grad(score, features)
        # each channel counts as much as the score grows with it, on average over the grid;
        # relu: what speaks against the label is not shown
        weights = grad.mean((2, 3), keepdim=True)           # (1,k,1,1)
        cam = F.relu((weights * features).sum(1, keepdim=True).detach())        # (1,1,h,w)
        cam = cam / cam.max().clamp_min(1e-12)
        return F.interpolate(cam, (self.sz, self.sz), mode="bilinear")[0, 0].cpu().numpy()
