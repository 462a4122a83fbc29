"""Images that are there twice: with the same pixels, or re-encoded, resized, mirrored, cropped by a tenth.

The colours of an image on a grid of 8x8 find the images that may be twins of it, or of its mirror image.
Those are compared in detail: by the correlation of their edges, where these fit best on each other."""
import hashlib
import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import cv2
import numpy as np
import torch
from fastcore.all import chunked

from ..files import read_file
from ..log import log
from .folder import keep, sha256

SIDE, GRID = 32, 8              # pixels on which images are compared, and cells by which they are found
NEIGHBOURS, CHUNK = 3, 500      # candidates of an image, and images whose candidates are looked up at once
ALIKE = 0.7                     # correlation of the grids of candidates
WINDOW = 26                     # pixels of the middle of one image that are looked for in the other
SCALES = 0.95, 0.9              # how much smaller one image may show what both do
PERHAPS = 0.5                   # correlation of the edges from which on other scales are tried
QUICK = 10**8                   # pairs of images that are searched in some 4 s
NEAR = 0.88                     # the one of twins: measured by bench/planted.py


def exact_twins(images):
    "For each of n images (h,w,3) the first one with the same pixels, itself where it is the first: (n,)."
    first: dict[bytes, int] = {}
    hashes = (hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images)
    return np.array([first.setdefault(o, row) for row, o in enumerate(hashes)], dtype=int)


def near_twins(images, rows, among, mirrored=True):
    """Pairs (a, b, score) of images (n,h,w,3) that are twins: a of `rows`, b of `among`.

    Each pair is there once. mirrored: whether a mirror image is a twin."""
    found: dict[tuple, float] = {}
    if not len(rows) or not len(among): return []
    for mirror in (False, True) if mirrored else (False,):
        def compare(pairs, mirror=mirror): return [likeness(images[a], images[b], mirror) for a, b in pairs]
        pairs = candidates(images, rows, among, mirror)
        with ThreadPoolExecutor() as pool: scores = [*chain(*pool.map(compare, chunked(pairs, CHUNK)))]
        for pair, score in zip(pairs, scores): found[pair] = max(score, found.get(pair, 0))
    limit = threshold(rows, found)
    return [(*pair, score) for pair, score in sorted(found.items()) if score >= limit]


def threshold(rows, found):
    """The correlation of twins in a set: NEAR, or more where all images are alike, as digits are.

    There a twin lacks at most a quarter as much to 1 as the nearest image usually does."""
    best = dict.fromkeys(rows.tolist(), 0.0)
    for (a, b), score in found.items():
        for row in (a, b):
            if row in best: best[row] = max(best[row], score)
    return max(NEAR, 1 - (1 - np.quantile(list(best.values()), 0.25)) / 4)


def tested_twins(data, cache, wait=True):
    """Which images of test have a twin in train or valid, as an array of True and False; kept below `cache`.

    None without a test set, and for pictures of 8 pixels, too few to tell twins. wait: without it, only twins
    with the same pixels where the others are not kept and would take more than a few seconds."""
    if not len(data.test) or 0 < data.side <= GRID: return None
    others = np.sort(np.concatenate((data.train, data.valid)))
    rows = [zlib.crc32(o.tobytes()) for o in (data.test, others)]
    kept = cache / f"twins-{sha256((data.checksum, rows, NEAR, data.mirrored))[:16]}.npz"
    try:
        # it has a byte for each image, and some for its headers
        with np.load(io.BytesIO(read_file(kept, len(data.test) + 2000))) as z: twin = z["twin"]
        if twin.shape == data.test.shape and twin.dtype == bool: return twin
    except Exception: pass      # not there, or damaged, for which NumPy raises anything
    first = exact_twins(data.images[row] for row in (*others, *data.test))[len(others):]
    same = first < len(others)
    if len(data.test) * len(others) > QUICK:
        if not wait: return same
        log.info("Looking for near twins of %s test images, once", f"{len(data.test):,}")
    found = [a for a, *_ in near_twins(data.images, data.test, others, data.mirrored)]
    twin = same | np.isin(data.test, found)
    keep(kept, twin=twin)
    return twin


def candidates(images, rows, among, mirror):
    "The pairs (a, b) whose grids are alike, b of `among` being one of the nearest of a of `rows`."
    grids, pairs = torch.from_numpy(describe(images, among)), set()
    for part in np.array_split(rows, -(-len(rows) // CHUNK)):
        near = torch.from_numpy(describe(images, part, mirror)) @ grids.T           # (chunk, among)
        values, at = near.topk(min(NEIGHBOURS, len(among)))
        hits = np.argwhere(values.numpy() >= ALIKE)
        pairs |= {(int(part[i]), int(among[at[i, k]])) for i, k in hits}
    both = set(rows.tolist()) & set(among.tolist())
    # where each is looked up for the other, the smaller row goes first
    pairs = {(min(a, b), max(a, b)) if a in both and b in both else (a, b) for a, b in pairs if a != b}
    return sorted(pairs)


def describe(images, rows, mirror=False):
    "The colours on a grid of images (n,h,w,3), less their mean and of length 1: (rows, GRID * GRID * 3)."
    x = np.stack([cv2.resize(images[row], (GRID, GRID), interpolation=cv2.INTER_AREA) for row in rows])
    if mirror: x = x[:, :, ::-1]
    x = x.reshape(len(x), -1).astype(np.float32)
    x -= x.mean(1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


def likeness(a, b, mirror):
    "The correlation of the edges of two images (h,w,3), or of the mirror image of `a`, where they fit best."
    a, b = (cv2.resize(o, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for o in (a, b))
    if mirror: a = np.ascontiguousarray(a[:, ::-1])
    a, b = edges(a), edges(b)
    best = correlation(a, b, SIDE)
    if best < PERHAPS: return best
    smaller = [round(SIDE * scale) for scale in SCALES]
    return max(best, *(correlation(*pair, side) for side in smaller for pair in ((a, b), (b, a))))


def edges(x):
    "What of an image (h,w,3) is neither finer than a pixel nor coarser than some: (h,w,3) float32."
    x = x.astype(np.float32)
    return cv2.GaussianBlur(x, (0, 0), 0.7) - cv2.GaussianBlur(x, (0, 0), 3)


def correlation(a, b, side):
    "The largest correlation of the middle of `a`, made `side` pixels large, with any part of `b`."
    if side != SIDE: a = cv2.resize(a, (side, side), interpolation=cv2.INTER_AREA)
    from_ = (side - WINDOW) // 2
    part = a[from_:from_ + WINDOW, from_:from_ + WINDOW]
    # of images without edges the correlation is 0 / 0, for which OpenCV gives 1
    if min(part.std(), b.std()) < 1: return 0.0
    return float(cv2.matchTemplate(b, part, cv2.TM_CCOEFF_NORMED).max())
