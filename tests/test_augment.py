import random

import numpy as np

from sifar.augment import Cutout, seed_tfms, standard_tfms

FILL = (1, 2, 3)


def image(): return np.random.default_rng(0).integers(10, 256, (32, 32, 3), dtype=np.uint8)


def placed(out, img):
    "Whether and where (dy, dx, mirrored) `out` is a crop of the padded `img`, apart from one hole."
    padded = np.full((40, 40, 3), FILL, np.uint8)
    padded[4:36, 4:36] = img
    hole = (out == FILL).all(-1)
    for mirrored in (False, True):
        for dy in range(9):
            for dx in range(9):
                crop = padded[dy:dy + 32, dx:dx + 32][:, ::-1 if mirrored else 1]
                if ((out == crop).all(-1) | hole).all(): return dy, dx, mirrored


def test_every_offset_and_both_sides_are_seen():
    tfms, img = standard_tfms(fill=FILL), image()
    seed_tfms(tfms, 0)
    seen = [placed(tfms(image=img)["image"], img) for _ in range(1500)]
    assert len({o[:2] for o in seen}) == 81
    assert 0.45 < np.mean([o[2] for o in seen]) < 0.55


def test_digits_are_not_mirrored():
    tfms, img = standard_tfms(mirror=False, fill=FILL), image()
    assert not any(placed(tfms(image=img)["image"], img)[2] for _ in range(100))


def test_cutout_fills_one_square_of_8_wherever_its_centre_is():
    cut, img, count = Cutout(8, FILL), image(), np.zeros((32, 32))
    for _ in range(3000):
        hole = (cut(image=img)["image"] == FILL).all(-1)
        ys, xs = np.nonzero(hole)
        assert hole[ys.min():ys.max() + 1, xs.min():xs.max() + 1].all() and 4 <= np.ptp(ys) + 1 <= 8 and 4 <= np.ptp(xs) + 1 <= 8
        count += hole
    middle = count[8:24, 8:24] / 3000
    assert abs(middle.mean() - (8 / 32) ** 2) < 0.005 and count.min() > 0
    assert (img != FILL).any(-1).all(), "the image itself is left as it is"


def test_one_seed_one_stream():
    def stream(seed):
        tfms = standard_tfms()
        seed_tfms(tfms, seed)
        return [tfms(image=image())["image"] for _ in range(5)]
    a, b, c = stream(3), stream(3), stream(4)
    assert all((x == y).all() for x, y in zip(a, b)) and not all((x == y).all() for x, y in zip(a, c))
    random.seed(0)
    np.random.seed(0)
    assert all((x == y).all() for x, y in zip(a, stream(3))), "the global random state has no part in it"


def test_the_policy_scales_with_the_size():
    out = standard_tfms(64)(image=np.full((64, 64, 3), 9, np.uint8))["image"]
    assert out.shape == (64, 64, 3) and (out == 0).all(-1).sum() >= 8 * 8
