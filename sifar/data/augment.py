"""What is done to training images, as albumentations transforms."""
import os
import random

import numpy as np

# otherwise its import asks the network for a newer version
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2


class Cutout(A.ImageOnlyTransform):
    """Fill one square of `size` pixels, its centre anywhere in the image, with the colour `fill`.

    albumentations' CoarseDropout does the same for any number of holes, and takes 15 times as long for one.
    https://arxiv.org/abs/1708.04552"""

    def __init__(self, size=8, fill=0, p=1.0):
        super().__init__(p=p)
        self.size, self.fill = size, fill

    def get_params_dependent_on_data(self, params, data):
        h, w = params["shape"][:2]
        y, x = self.py_random.randrange(h), self.py_random.randrange(w)         # the centre
        return {"y": y - self.size // 2, "x": x - self.size // 2}

    def apply(self, img, y, x, **params):
        img = img.copy()
        # (h,w,3); the hole may lie partly outside
        img[max(y, 0):max(y + self.size, 0), max(x, 0):max(x + self.size, 0)] = self.fill
        return img


def get_tfms(aug="standard", sz=32, mirror=True, fill=(0, 0, 0)):
    """Pad by an eighth (4 of 32 pixels) and crop at random, mirror half of the images, one hole of a quarter.

    `light` leaves out the hole (Cutout). Before it, `trivial` adds one random change of any strength, `rand`
    two of up to 9/30 of it. `weak` pads by a sixteenth with what lies beside, and does no more.
    https://arxiv.org/abs/2103.10158 https://arxiv.org/abs/1909.13719"""
    if aug == "weak":
        # its images are mirrored as they are read, in every second epoch: see ArrayDL
        pad = sz + 2 * (sz // 16)
        return A.Compose([A.PadIfNeeded(pad, pad, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(sz, sz)])
    pad = sz + 2 * (sz // 8)
    hole = Cutout(sz // 4, fill)
    policies = {
        "light": [],
        "standard": [hole],
        "trivial": [A.OneOf(random_changes(1.0, fill), p=1), hole],
        "rand": [A.SomeOf(random_changes(0.3, fill), n=2, replace=True, p=1), hole],
    }
    # RandomCrop(32, 32, pad=4) and pad_if_needed=True would do nothing, without an error
    tfms = [A.PadIfNeeded(pad, pad, border_mode=0, fill=fill), A.RandomCrop(sz, sz)]
    if mirror: tfms.append(A.HorizontalFlip(p=0.5))
    return A.Compose(tfms + policies[aug])


def random_changes(share, fill):
    "The 14 transforms of TrivialAugment, each with a strength drawn from up to `share` of its widest range."
    def move(**kwargs): return A.Affine(**kwargs, fill=fill, p=1)
    none = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    def colour(**kwargs): return A.ColorJitter(**{**none, **kwargs}, p=1)
    angle, shift, factor = 45 * share, share, (1 - 0.99 * share, 1 + 0.99 * share)
    return [
        A.NoOp(p=1), A.AutoContrast(p=1), A.Equalize(p=1),
        move(shear={"x": (-angle, angle), "y": (0, 0)}), move(shear={"x": (0, 0), "y": (-angle, angle)}),
        move(translate_percent={"x": (-shift, shift), "y": (0, 0)}),
        move(translate_percent={"x": (0, 0), "y": (-shift, shift)}),
        move(rotate=(-135 * share, 135 * share)),
        colour(brightness=factor), colour(contrast=factor), colour(saturation=factor),
        A.Sharpen(alpha=(0, 0.08 * share), lightness=(1, 1), p=1),
        A.Posterize(num_bits=(round(8 - 6 * share), 8), p=1),
        A.Solarize(threshold_range=(1 - share, 1), p=1),
    ]


def seed_tfms(tfms, seed):
    "Let all transforms of the Compose `tfms` draw from one stream of random numbers that starts at `seed`."
    tfms.set_random_state(np.random.default_rng(seed), random.Random(seed))
