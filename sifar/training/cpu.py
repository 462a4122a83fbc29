"""Faster training on a CPU: memory is kept, and what oneDNN is slow at in small images is a matrix product.

Shapes: images are (n,c,h,w), filters (co,ci,k,k), and `pixels` are those of an output, ho * wo."""
import ctypes
import sys

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8          # of glibc's malloc.h

# The most pixels of an output at which products are faster than oneDNN (measured: bench/README.md)
WEIGHTS = 9         # 3x3: for the gradient of the weights alone, in bfloat16
HALVED = 64         # 8x8: the same, where a 3x3 convolution halves the side
UNPADDED = 100      # 10x10: the same, where a 3x3 convolution pads nothing, which a product would multiply
WITH_AMX = 36       # 6x6: the same, on a processor with AMX
ALL = 16            # 4x4: for all passes, with AMX and in float32; but the gradient of x with stride 1 alone
# In float32 products are faster with many filters alone: of at least so many numbers
WIDE = 2**19


def keep_memory():
    "Let glibc keep the memory that is freed: new, zeroed pages from the system at each batch take longer."
    if sys.platform != "linux": return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt: return                      # another C library, such as musl
    mallopt(M_MMAP_MAX, 0)  # no large block is a mapping of its own, which free would unmap
    mallopt(M_TRIM_THRESHOLD, -1)               # the top of the heap is never given back
    mallopt(M_ARENA_MAX, 1)  # the threads of autograd share one heap, where they find freed blocks


def patches(x, k, stride, padding):
    "The k x k patches of x (n,c,h,w) as rows of a matrix (n*ho*wo,k*k*c), and the shape (n,ho,wo)."
    pad = 0, 0, padding, padding, padding, padding  # from the last dimension on: c, w, h
    # (n,h+2p,w+2p,c), as channels_last is in memory
    x = F.pad(x.permute(0, 2, 3, 1), pad).contiguous()
    n, h, w, c = x.shape
    shape = n, (h - k) // stride + 1, (w - k) // stride + 1
    of_n, of_h, of_w, _ = x.stride()
    # a view in which patches overlap: the next patch is `stride` pixels away, the next of its pixels one
    strides = of_n, of_h * stride, of_w * stride, of_h, of_w, 1
    overlapping = x.as_strided((*shape, k, k, c), strides)      # (n,ho,wo,k,k,c)
    return overlapping.reshape(-1, k * k * c), shape            # here it is copied


def product(weight, rows, shape):
    "The convolution of `patches` with filters (co,ci,k,k) as one matrix product: (n,co,ho,wo)."
    # (co,k*k*ci), in the order of the patches
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    y = rows @ matrix.T                                                 # (n*ho*wo,co)
    return y.view(*shape, -1).permute(0, 3, 1, 2)   # channels_last again, without a copy


class SmallConv(torch.autograd.Function):
    """F.conv2d whose gradient of the weights is a matrix product; with `all_passes` the others too, if small.

    oneDNN's gradient of the weights goes through an image row by row, and rows are short there."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding, all_passes):
        k, rows = weight.shape[2], None
        ctx.stride, ctx.padding = stride, padding
        if all_passes and output_pixels(x, k, stride, padding) <= ALL:
            rows, shape = patches(x, k, stride, padding)
            y = product(weight, rows, shape)
        else: y = F.conv2d(x, weight, None, stride, padding)
        ctx.save_for_backward(x, weight, rows)
        return y

    @staticmethod
    def backward(ctx, grad):                    # grad (n,co,ho,wo)
        x, weight, rows = ctx.saved_tensors
        grad_x = grad_weight = None
        how = ctx.stride, ctx.padding
        if ctx.needs_input_grad[1]: grad_weight = weight_gradient(x, weight, rows, grad, *how)
        # a forward pass by a product has rows
        if ctx.needs_input_grad[0]: grad_x = input_gradient(x, weight, grad, *how, rows is not None)
        return grad_x, grad_weight, None, None, None


def weight_gradient(x, weight, rows, grad, stride, padding):
    "The gradient of filters (co,ci,k,k): each output pixel adds its patch of x times its gradient."
    co, ci, k, _ = weight.shape
    if rows is None: rows, _ = patches(x, k, stride, padding)
    columns = grad.permute(0, 2, 3, 1).reshape(-1, co)                  # (n*ho*wo,co)
    return (columns.T @ rows).view(co, k, k, ci).permute(0, 3, 1, 2)    # (co,k*k*ci) -> (co,ci,k,k)


def input_gradient(x, weight, grad, stride, padding, by_product):
    "The gradient of x (n,ci,h,w)."
    if stride > 1 or not by_product:
        # torch.nn.grad.conv2d_input makes one in the order (n,ci,h,w) of memory, which takes longer
        how = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1         # not dilated, transposed, grouped
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *how, (True, False, False))[0]
    # with stride 1 it is a convolution too: of grad, padded to the size of x, with the filters turned
    # by half a circle, and their inputs and outputs exchanged
    k = weight.shape[2]
    return product(weight.flip(2, 3).transpose(0, 1), *patches(grad, k, 1, k - 1 - padding))


def output_pixels(x, k, stride, padding):
    h, w = ((side + 2 * padding - k) // stride + 1 for side in x.shape[2:])
    return h * w


class SmallConvs(TorchFunctionMode):
    """Within this context, convolutions to few pixels are done by SmallConv, in `dtype`.

    all_passes: not the gradient of the weights alone, which is faster in float32 and with AMX.
    A mode sees each call before autocast does, so the types are changed here."""

    def __init__(self, dtype, all_passes):
        super().__init__()
        self.dtype, self.all_passes = dtype, all_passes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # nn.Conv2d passes all by position; a call by name is somebody else's
        if func is not F.conv2d or kwargs or not suits(self.dtype, self.all_passes, *args):
            return func(*args, **kwargs or {})
        x, weight, _, stride, padding, *_ = args
        # autograd.Function does not know fastai's types
        x = x.as_subclass(torch.Tensor).to(self.dtype)
        return SmallConv.apply(x, weight.to(self.dtype), stride[0], padding[0], self.all_passes)


def suits(dtype, all_passes, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    "Whether SmallConv can compute this call of F.conv2d by nn.Conv2d, and in `dtype` faster."
    if bias is not None or groups != 1: return False
    # such as padding="same"
    if any(not isinstance(v, tuple) for v in (stride, padding, dilation)): return False
    if any(a != b for a, b in (weight.shape[2:], stride, padding)): return False    # not square
    k = weight.shape[2]
    # where padding is as large as the filter, patches of grad would need a negative one
    if dilation != (1, 1) or padding[0] >= k: return False
    pixels = output_pixels(x, k, stride[0], padding[0])
    if dtype == torch.float32: return 0 < pixels <= ALL and weight.numel() >= WIDE
    if all_passes: most = WITH_AMX
    elif k == 3 and stride[0] == 2: most = HALVED
    elif k == 3 and not padding[0]: most = UNPADDED
    else: most = WEIGHTS
    return 0 < pixels <= most
