import random

import numpy as np
import pytest

from sifar.data.augment import Cutout, get_tfms, random_changes, seed_tfms

FILL = (1, 2, 3)


def image():
    return np.random.default_rng(0).integers(10, 256, (32, 32, 3), dtype=np.uint8)


def placed(out, img):
    "Whether and where (dy, dx, mirrored) `out` is a crop of the padded `img`, apart from one hole."
    padded = np.full((40, 40, 3), FILL, np.uint8)
    padded[4:36, 4:36] = img
    hole = (out == FILL).all(-1)
    for mirrored in (False, True):
        for dy in range(9):
            for dx in range(9):
                crop = padded[dy : dy + 32, dx : dx + 32][:, :: -1 if mirrored else 1]
                if ((out == crop).all(-1) | hole).all():
                    return dy, dx, mirrored


def test_light_crops_and_mirrors_without_a_hole():
    tfms, img = get_tfms("light", fill=FILL), image()
    seed_tfms(tfms, 0)
    for _ in range(50):
        seen = (tfms(image=img)["image"] != FILL).any(-1)
        assert seen[np.ix_(seen.any(1), seen.any(0))].all() and seen.sum() >= 28 * 28


def test_digits_are_not_mirrored():
    tfms, img = get_tfms(mirror=False, fill=FILL), image()
    assert not any(placed(tfms(image=img)["image"], img)[2] for _ in range(100))


def test_cutout_fills_one_square_of_8_wherever_its_centre_is():
    cut, img, count = Cutout(8, FILL), image(), np.zeros((32, 32))
    for _ in range(3000):
        hole = (cut(image=img)["image"] == FILL).all(-1)
        ys, xs = np.nonzero(hole)
        assert (
            hole[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()
            and 4 <= np.ptp(ys) + 1 <= 8
            and 4 <= np.ptp(xs) + 1 <= 8
        )
        count += hole
    middle = count[8:24, 8:24] / 3000
    assert abs(middle.mean() - (8 / 32) ** 2) < 0.005 and count.min() > 0
    assert (img != FILL).any(-1).all(), "the image itself is left as it is"


def test_one_seed_one_stream():
    def stream(seed):
        tfms = get_tfms()
        seed_tfms(tfms, seed)
        return [tfms(image=image())["image"] for _ in range(5)]

    a, b, c = stream(3), stream(3), stream(4)
    assert all((x == y).all() for x, y in zip(a, b)) and not all((x == y).all() for x, y in zip(a, c))
    random.seed(0)
    np.random.seed(0)
    assert all((x == y).all() for x, y in zip(a, stream(3))), "the global random state has no part in it"


def test_the_policy_scales_with_the_size():
    out = get_tfms(sz=64)(image=np.full((64, 64, 3), 9, np.uint8))["image"]
    assert out.shape == (64, 64, 3) and (out == 0).all(-1).sum() >= 8 * 8


@pytest.mark.parametrize("aug", ["trivial", "rand"])
def test_policies_change_images_in_many_ways_by_the_seed_alone(aug):
    tfms, img = get_tfms(aug), np.full((32, 32, 3), 100, np.uint8)
    img[8:24, 8:24] = (250, 20, 60)

    def stream(seed):
        seed_tfms(tfms, seed)
        return [tfms(image=img)["image"] for _ in range(200)]

    a = stream(1)
    assert all((x == y).all() for x, y in zip(a, stream(1))) and any(
        (x != y).any() for x, y in zip(a, stream(2))
    )
    assert (
        all(o.shape == (32, 32, 3) and o.dtype == np.uint8 for o in a) and len({o.tobytes() for o in a}) > 190
    )
    standard = get_tfms()
    seed_tfms(standard, 1)
    colours = [
        len({tuple(p) for o in stream for p in o.reshape(-1, 3)})
        for stream in (a, [standard(image=img)["image"] for _ in range(200)])
    ]
    assert colours[0] > 100 and colours[1] == 3, "two colours and the fill"


def test_trivial_augment_goes_further_than_rand_augment():
    def farthest(share):
        tfms, img = random_changes(share, (0, 0, 0)), image()
        return [max(abs(tfm(image=img)["image"].astype(int) - img).mean() for _ in range(40)) for tfm in tfms]

    wide, narrow = farthest(1.0), farthest(0.3)
    assert wide[0] == narrow[0] == 0 and len(wide) == 14 and all(a > 0 for a in wide[1:])
    assert all(a > b for a, b in list(zip(wide, narrow))[8:]), (
        "brightness, contrast, saturation, sharpness, bits and threshold"
    )
