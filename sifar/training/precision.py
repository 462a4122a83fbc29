"""The device that trains, and the type of number that it computes in."""
import torch

from ..errors import UserError
from .cpu import fast_at_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name="auto"):
    "The torch.device for auto, cpu, cuda, cuda:N or mps. Errors: UserError where it is not there."
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    if name == "auto": return torch.device(there[-1])
    try: device = torch.device(name)
    except RuntimeError: device = None
    if device is None or device.type not in there or (device.index or 0) >= (torch.cuda.device_count() if device.type == "cuda" else 1):
        raise UserError(f"--device {name} is not on this machine: there is {', '.join(there)}.")
    return device


def pick_precision(name, device):
    "The torch.dtype of the forward pass: for auto bfloat16 where `device` is fast at it, float16 on older GPUs, else float32."
    if name != "auto": return DTYPES[name]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    return torch.bfloat16 if device.type == "cpu" and fast_at_bf16() else torch.float32
