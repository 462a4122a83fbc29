"""A picture of any kind as a small RGB image."""
import functools
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError, one_line

MAX_PIXELS, MAX_SIDE = 64_000_000, 16_384        # of a picture that is read; looked at before it is decoded


@functools.cache
def formats():
    "What Pillow can read, but for formats that it hands to another program, and those that hold a picture of another, whose size it does not say before it is decoded."
    Image.init()
    return [o for o in Image.ID if o not in ("EPS", "WMF", "ICO", "CUR", "ICNS", "BLP")]


def read_image(o, sz, min_side=1, max_pixels=MAX_PIXELS):
    """A path, the bytes of an image file, an array or a Pillow image, as a Pillow image of `sz` x `sz` pixels, RGB.

    Errors: UserError for what is no image, is damaged, too small or too large."""
    name = o if isinstance(o, (str, Path)) else "The image"
    warnings.filterwarnings("ignore", module=r"PIL\.")          # odd metadata, and sizes for which the rule below is stricter; catch_warnings is not for threads

    def fit(img):
        if min(img.size) < min_side: raise UserError(f"{name} has only {img.width} x {img.height} pixels.")
        if img.width * img.height > max_pixels or max(img.size) > MAX_SIDE:
            raise UserError(f"{name} is too large: {img.width:,} x {img.height:,} pixels, but at most {max_pixels // 10**6} million, and {MAX_SIDE:,} on a side, are read.")
        return fit_image(img, sz)

    try:
        if isinstance(o, Image.Image): return fit(o)
        if isinstance(o, np.ndarray): return fit(array_image(o))
        if not isinstance(o, (str, Path, bytes)): raise UserError(f"An image is a path, bytes, an array or a Pillow image, not a {type(o).__name__}.")
        with Image.open(io.BytesIO(o) if isinstance(o, bytes) else o, formats=formats()) as img: return fit(img)
    except UserError: raise
    except FileNotFoundError as e: raise UserError(f"{name} is missing.") from e
    except Image.DecompressionBombError as e: raise UserError(f"{name} is too large: at most {max_pixels // 10**6} million pixels are read.") from e
    except UnidentifiedImageError as e: raise UserError(f"{name} is not an image that can be read here, such as JPEG, PNG, WebP, GIF, BMP or TIFF.") from e
    except Exception as e: raise UserError(f"{name} cannot be read as an image: {one_line(e, 200)}") from e


def fit_image(img, sz):
    "Any Pillow image as `sz` x `sz` RGB: upright by EXIF, 16 bits scaled, alpha on white, resized, centre crop."
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith(("I", "F")): img = array_image(np.asarray(img))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    img = img.convert("RGB")
    return img if img.size == (sz, sz) else ImageOps.fit(img, (sz, sz), Image.Resampling.BICUBIC)


def array_image(x):
    """An array (h,w), (h,w,1), (h,w,3) or (h,w,4) as an 8-bit Pillow image.

    White is 255, for uint16 and for whole numbers above 255 it is 65,535, for floats with nothing above it 1. Errors: UserError."""
    if x.ndim == 3 and x.shape[2] == 1: x = x[..., 0]
    if x.ndim not in (2, 3) or x.ndim == 3 and x.shape[2] not in (3, 4) or not x.size or x.dtype.kind not in "buif":
        raise UserError(f"An array of shape {x.shape} and type {x.dtype} is no image: it should be (h,w), (h,w,3) or (h,w,4), of numbers.")
    if x.dtype == np.uint8: return Image.fromarray(np.ascontiguousarray(x))
    x, kind, deep = np.nan_to_num(x.astype(np.float32)), x.dtype.kind, x.dtype.kind == "u" and x.itemsize == 2
    top = 1 if kind == "b" or kind == "f" and x.max() <= 1 else 65_535 if deep or kind != "f" and x.max() > 255 else 255
    return Image.fromarray((x * (255 / top)).round().clip(0, 255).astype(np.uint8))
