"""A picture of any kind as a small RGB image."""
import functools
import io
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError, is_visible, need, one_line

MAX_PIXELS, MAX_SIDE = 64_000_000, 16_384        # of a picture that is read; looked at before it is decoded
GEOMETRY = "halfway, 90 %, bilinear"    # of fit_image: another one makes the caches of folders anew
# which parts of a picture are its views; of four, two are the mirror images of the others
VIEWS = {1: (0.9,), 2: (1, 0.8), 4: (1, 0.8)}
# how a picture becomes square, by the longest side that is seen of one of w x h pixels
FITS: dict[str, Callable] = {"halfway": lambda w, h: math.sqrt(w * h), "crop": min, "pad": max, "squash": max}
GREY = (127, 127, 127)                  # beside a picture that is padded
MAX_CLASSES, MAX_NAME = 100_000, 255


@functools.cache
def formats():
    """The names of the formats that are read: Pillow's, but for six.

    EPS and WMF are handed to other programs; the others do not say how large a picture is before it is
    decoded."""
    Image.init()
    with suppress(ImportError):     # HEIC, the format of phones, where pillow-heif is installed
        import pillow_heif
        pillow_heif.register_heif_opener()
    return [name for name in Image.ID if name not in ("EPS", "WMF", "ICO", "CUR", "ICNS", "BLP")]


def read_image(o, sz, fit="halfway"):
    """A path, the bytes of an image file, an array or a Pillow image, as a Pillow image (sz,sz), RGB.

    Errors: those of `read_rgb`."""
    return fit_views(read_rgb(o), sz, fit=fit)[0]


def read_rgb(o, min_side=1):
    """An image of any kind as a Pillow image, RGB and upright, in its own size.

    Errors: UserError for what is no image, is damaged, too small or too large."""
    name = o if isinstance(o, (str, Path)) else "The image"
    with explained(name), open_image(o) as img:
        check_size(img, name, min_side)
        return upright_rgb(img)


@contextmanager
def explained(name, max_pixels=MAX_PIXELS):
    "Whatever Pillow raises for the image `name` is a UserError that says so."
    # odd metadata, and sizes for which check_size is stricter; catch_warnings is not for threads
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try: yield
    except UserError: raise
    except FileNotFoundError as e:
        raise UserError(f"{name} is missing.") from e
    except Image.DecompressionBombError as e:
        raise UserError(f"{name} is too large: at most {max_pixels // 10**6} million pixels are read.") from e
    except UnidentifiedImageError as e:
        if Path(str(name)).suffix.lower() in (".heic", ".heif"):
            raise UserError(f"{name} is HEIC: pip install pillow-heif, or convert it to JPEG.") from e
        known = "JPEG, PNG, WebP, GIF, BMP or TIFF"
        raise UserError(f"{name} is not an image that can be read here, such as {known}.") from e
    # Pillow's decoders raise anything for a damaged file
    except Exception as e:
        raise UserError(f"{name} cannot be read as an image: {one_line(e, 200)}") from e


def open_image(o):
    "Any kind of image as a Pillow image whose pixels need not be decoded yet. Errors: UserError, Pillow's."
    if isinstance(o, Image.Image): return nullcontext(o)
    if isinstance(o, np.ndarray): return nullcontext(array_image(o))
    if isinstance(o, bytes): return Image.open(io.BytesIO(o), formats=formats())
    if isinstance(o, (str, Path)): return Image.open(o, formats=formats())
    raise UserError(f"An image is a path, bytes, an array or a Pillow image, not a {type(o).__name__}.")


def check_size(img, name, min_side, max_pixels=MAX_PIXELS):
    "Raise a UserError for an image that is too small or too large, before it is decoded."
    if min(img.size) < min_side: raise UserError(f"{name} has only {img.width} x {img.height} pixels.")
    if img.width * img.height <= max_pixels and max(img.size) <= MAX_SIDE: return
    size = f"{img.width:,} x {img.height:,} pixels"
    most = f"at most {max_pixels // 10**6} million, and {MAX_SIDE:,} on a side, are read"
    raise UserError(f"{name} is too large: {size}, but {most}.")


def upright_rgb(img):
    "Any Pillow image as RGB: upright by EXIF, 16 bits scaled, alpha on white."
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith(("I", "F")): img = array_image(np.asarray(img))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img.convert("RGB")


def fit_views(img, sz, n=1, fit="halfway"):
    """The RGB image `img` as `n` images of `sz` x `sz`: one, two crops, or those and their mirror images.

    fit: one of FITS. An image that has the size already stays as it is."""
    if img.size == (sz, sz): return n * [img]
    shares = VIEWS[n] if n > 1 else [None]          # None: that of `fit`
    views = [fit_view(img, sz, fit, share) for share in shares]
    if n == 4: views += [ImageOps.mirror(view) for view in views]
    return views


def fit_view(img, sz, fit, share=None):
    "The part of an image that `crop_box` says as one of `sz` x `sz`: squeezed, or with grey beside it."
    box = crop_box(img.size, fit, share)
    if fit != "pad": return img.resize((sz, sz), Image.Resampling.BILINEAR, box)
    w, h = (max(1, round(sz * side / max(img.size))) for side in img.size)
    view = Image.new("RGB", (sz, sz), GREY)
    view.paste(img.resize((w, h), Image.Resampling.BILINEAR, box), ((sz - w) // 2, (sz - h) // 2))
    return view


def crop_box(size, fit="halfway", share=None):
    """The part (left, top, right, bottom) of a picture of `size` (w,h) that is seen.

    halfway: its aspect ratio is the square root of the picture's, between a square (crop) and the whole
    picture (squash, pad). It takes `share` of those sides, by default 0.9; the others take all of them. On
    photographs halfway is better than either: see bench/photos.py."""
    w, h = size
    if share is None: share = VIEWS[1][0] if fit == "halfway" else 1
    side = FITS[fit](w, h)
    dx, dy = (w - share * min(w, side)) / 2, (h - share * min(h, side)) / 2
    return dx, dy, w - dx, h - dy


def array_image(x):
    """An array (h,w), (h,w,1), (h,w,3) or (h,w,4) as an 8-bit Pillow image.

    White is 255; for uint16, and for whole numbers above 255, it is 65,535; for floats with nothing above it,
    it is 1. Errors: UserError."""
    if x.ndim == 3 and x.shape[2] == 1: x = x[..., 0]
    shaped = x.ndim == 2 or x.ndim == 3 and x.shape[2] in (3, 4)
    if not shaped or not x.size or x.dtype.kind not in "buif":
        wanted = "it should be (h,w), (h,w,3) or (h,w,4), of numbers"
        raise UserError(f"An array of shape {x.shape} and type {x.dtype} is no image: {wanted}.")
    if x.dtype == np.uint8: return Image.fromarray(np.ascontiguousarray(x))
    dtype, x = x.dtype, np.nan_to_num(x.astype(np.float32))
    x *= 255 / white(dtype, x.max())
    return Image.fromarray(x.round().clip(0, 255).astype(np.uint8))


def white(dtype, largest):
    "The value of white in an array of `dtype` whose largest number is `largest`."
    if dtype.kind == "b": return 1
    if dtype.kind == "f": return 1 if largest <= 1 else 255
    return 65_535 if dtype == np.uint16 or largest > 255 else 255


# ---- what the file of a model says of its pictures ----

def check_facts(o):
    """Check what a dictionary, maybe a stranger's, says of image size, fit, classes and superclasses.

    Errors: UserError where one is of another type or out of its bounds; KeyError for what is missing."""
    sz, vocab, superclasses, fit = o["size"], o["classes"], o.get("superclasses"), o.get("fit", "halfway")
    need(type(fit) is str and fit in FITS, "its fit is not one of them")
    need(type(sz) is int and 8 <= sz <= 512, "its image size is not from 8 to 512 pixels")
    need(are_names(vocab), "its class names are no list of names in plain characters")
    need(len(set(vocab)) == len(vocab), "its class names are not all different")
    one_each = superclasses is None or are_names(superclasses) and len(superclasses) == len(vocab)
    need(one_each, "its superclasses are no list of a name for each class")


def are_names(o):
    "Whether `o` is a list of short texts without line breaks, controls, marks that turn writing round."
    if type(o) is not list or not 1 <= len(o) <= MAX_CLASSES: return False
    return all(type(v) is str and 1 <= len(v) <= MAX_NAME and is_visible(v) for v in o)
