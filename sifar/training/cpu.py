"""What makes training on a CPU faster: memory that is kept, and convolutions of small images as matrix products."""
import ctypes
import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8          # of glibc's malloc.h
ALL, WEIGHTS = 16, 36       # pixels of the output up to which products are faster: for the convolution and its gradients; for the weights' alone


def keep_memory():
    "Let glibc keep the memory that this process frees, instead of asking the system for zeroed pages again at each batch."
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for k, v in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1): mallopt(k, v)


def patches(x, k, stride, padding):
    "The k x k patches of x (n,c,h,w) as rows of a matrix (n*ho*wo,k*k*c), and the shape (n,ho,wo)."
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
    n, h, w, c = x.shape
    shape = n, (h - k) // stride + 1, (w - k) // stride + 1
    of_n, of_h, of_w, _ = x.stride()
    return x.as_strided((*shape, k, k, c), (of_n, of_h * stride, of_w * stride, of_h, of_w, 1)).reshape(-1, k * k * c), shape


def product(weight, rows, shape):
    "The convolution of `patches` with square filters (o,c,k,k) as one matrix product."
    return (rows @ weight.permute(0, 2, 3, 1).reshape(len(weight), -1).T).view(*shape, -1).permute(0, 3, 1, 2)


class SmallConv(torch.autograd.Function):
    "F.conv2d whose products are faster on small images: oneDNN's gradient of the weights goes row by row, and rows are short there."

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.stride, ctx.padding, k = stride, padding, weight.shape[2]
        if output_pixels(x, k, stride, padding) > ALL:
            ctx.save_for_backward(x, weight, None)
            return F.conv2d(x, weight, None, stride, padding)
        rows, shape = patches(x, k, stride, padding)
        ctx.save_for_backward(x, weight, rows)
        return product(weight, rows, shape)

    @staticmethod
    def backward(ctx, grad):
        (x, weight, rows), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        o, c, k, _ = weight.shape
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            if rows is None: rows, _ = patches(x, k, stride, padding)
            grad_weight = (grad.permute(0, 2, 3, 1).reshape(-1, o).T @ rows).view(o, k, k, c).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[0]:
            if stride == 1 and grad[0, 0].numel() <= ALL: grad_x = product(weight.flip(2, 3).transpose(0, 1), *patches(grad, k, 1, k - 1 - padding))
            else: grad_x = conv2d_input(x.shape, weight, grad, stride, padding)
        return grad_x, grad_weight, None, None


def output_pixels(x, k, stride, padding):
    h, w = ((o + 2 * padding - k) // stride + 1 for o in x.shape[2:])
    return h * w


class SmallConvs(TorchFunctionMode):
    "Within this context, convolutions to at most 6x6 pixels compute as SmallConv does, in `dtype`."

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d and not kwargs and suits(*args):
            x, weight, _, stride, padding, *_ = args
            return SmallConv.apply(x.as_subclass(torch.Tensor).to(self.dtype), weight.to(self.dtype), stride[0], padding[0])
        return func(*args, **kwargs or {})


def fast_at_bf16():
    "Whether this processor has instructions that multiply bfloat16 (AMX, AVX-512)."
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def small_convs(device, dtype):
    "SmallConvs where they are faster, in bfloat16 on processors that multiply it; elsewhere a context that does nothing."
    return SmallConvs(dtype) if device.type == "cpu" and dtype == torch.bfloat16 and fast_at_bf16() else nullcontext()


def suits(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    "Whether SmallConv can compute this call of F.conv2d by nn.Conv2d, and faster."
    if bias is not None or groups != 1 or any(not isinstance(o, tuple) for o in (stride, padding, dilation)): return False
    square = all(a == b for a, b in (weight.shape[2:], stride, padding)) and dilation == (1, 1) and padding[0] < weight.shape[2]
    return square and 0 < output_pixels(x, weight.shape[2], stride[0], padding[0]) <= WEIGHTS
