"""The device that trains, the type of number that it computes in, and what follows from them."""
import sys
import time
from contextlib import nullcontext
from functools import cache
from timeit import timeit

import torch

from ..distributed import from_first, local_rank, world
from ..errors import UserError
from .cpu import SmallConvs, keep_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name="auto"):
    "The torch.device for auto, cpu, cuda, cuda:N or mps. Errors: UserError where it is not there."
    there = ["cpu"]
    if torch.cuda.is_available(): there.append("cuda")
    if torch.backends.mps.is_available(): there.append("mps")
    if name == "auto": name = there[-1]
    # of several processes, each has a GPU
    if world() > 1 and name == "cuda": name = f"cuda:{local_rank()}"
    try: device = torch.device(name)
    except RuntimeError: device = None          # not a name that torch knows
    if device is None or device.type not in there or (device.index or 0) >= count(device):
        raise UserError(f"--device {name} is not on this machine: there is {', '.join(there)}.")
    return device


def count(device):
    "How many devices of its type this machine has."
    return torch.cuda.device_count() if device.type == "cuda" else 1


def pick_precision(name, device):
    "The torch.dtype of the forward pass; for auto the fastest type that `device` computes well in."
    if name != "auto": return DTYPES[name]
    # processes that share a training compute alike
    if device.type == "cpu" and from_first(faster_in_bf16()): return torch.bfloat16
    if device.type != "cuda": return torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 8: return torch.bfloat16        # Ampere and newer
    if major == 7: return torch.float16     # Volta and Turing: their tensor cores know no bfloat16
    return torch.float32


@cache
def faster_in_bf16():
    """Whether this processor is clearly faster at products in bfloat16 than in float32: a try of some ms.

    That it has instructions for bfloat16 does not tell: some need twice the time of float32."""
    if not multiplies_bf16(): return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # several wait for each other, and for what else the machine does
    try: tries = [(seconds_of_product(torch.bfloat16), seconds_of_product(torch.float32)) for _ in range(20)]
    finally: torch.set_num_threads(threads)
    # the least of each: interruptions only make it longer
    bf16, fp32 = map(min, zip(*tries))
    return bf16 < 0.8 * fp32


def seconds_of_product(dtype, n=512):
    "What the product of two matrices (n,n) takes of this thread's time on the processor."
    a = torch.ones(n, n, dtype=dtype)
    # this clock stops while others have the processor; on Windows it counts in steps of 16 ms
    clock = time.perf_counter if sys.platform == "win32" else time.thread_time
    return timeit(lambda: a @ a, timer=clock, number=1)


def multiplies_bf16():
    "Whether this processor has instructions that multiply bfloat16 (AMX, AVX-512)."
    able = capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def capabilities():
    "What instructions this processor has, by torch's names for them."
    if hasattr(torch.cpu, "get_capabilities"): return torch.cpu.get_capabilities()
    # before torch 2.11
    return {"amx_bf16": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}


def needs_autocast(dtype): return dtype != torch.float32


def small_convs(device, dtype):
    """SmallConvs where they are faster: on a CPU, in float32 and in a bfloat16 that it multiplies.

    Elsewhere a context that does nothing."""
    able = dtype == torch.float32 or dtype == torch.bfloat16 and multiplies_bf16()
    if device.type != "cpu" or not able: return nullcontext()
    return SmallConvs(dtype, all_passes=dtype == torch.float32 or bool(capabilities().get("amx_bf16")))


def prepare(device):
    "Set up torch, for this process, so that trainings on `device` are fast."
    if device.type == "cpu": keep_memory()
    # at each new shape cuDNN tries its algorithms: batches come in few shapes
    else: torch.backends.cudnn.benchmark = True


def runs_by_itself(device):
    "Whether the program has to wait for what `device` computes: true of GPUs."
    return device.type != "cpu"


def wait(device):
    "Wait until all that was started on `device` is done."
    if runs_by_itself(device): torch.accelerator.synchronize(device)
