"""What is done to training images, as albumentations transforms."""
import os
import random

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")       # its import asks the network for a newer version otherwise

import albumentations as A


class Cutout(A.ImageOnlyTransform):
    """Fill one square of `size` pixels, its centre anywhere in the image, with the colour `fill`. https://arxiv.org/abs/1708.04552

    albumentations' CoarseDropout does the same for any number of holes, and takes 15 times as long for one."""

    def __init__(self, size=8, fill=0, p=1.0):
        super().__init__(p=p)
        self.size, self.fill = size, fill

    def get_params_dependent_on_data(self, params, data):
        h, w = params["shape"][:2]
        return {"y": self.py_random.randrange(h) - self.size // 2, "x": self.py_random.randrange(w) - self.size // 2}

    def apply(self, img, y, x, **params):
        img = img.copy()
        img[max(y, 0):max(y + self.size, 0), max(x, 0):max(x + self.size, 0)] = self.fill
        return img


def standard_tfms(sz=32, mirror=True, fill=(0, 0, 0)):
    "Pad by an eighth (4 of 32 pixels) and crop at random, mirror half of the images, one Cutout hole of a quarter (8)."
    pad = sz + 2 * (sz // 8)
    return A.Compose([A.PadIfNeeded(pad, pad, border_mode=0, fill=fill), A.RandomCrop(sz, sz),
                      *([A.HorizontalFlip(p=0.5)] if mirror else []), Cutout(sz // 4, fill)])


def seed_tfms(tfms, seed):
    "Let all transforms of the Compose `tfms` draw from one stream of random numbers that starts at `seed`."
    rng, py_random = np.random.default_rng(seed), random.Random(seed)
    for o in (tfms, *tfms.transforms): o.set_random_state(rng, py_random)
