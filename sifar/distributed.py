"""Several processes that train one run together, as torchrun starts them; any other process is alone."""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

# what gloo and NCCL say in the processes that are left
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
        "connection was likely closed", "NCCL communicator was aborted", "Read error", "Write error",
        "Timed out waiting")


def launched(): return "TORCHELASTIC_RUN_ID" in os.environ
def world(): return told("WORLD_SIZE", 1)
def rank(): return told("RANK", 0)
def local_rank(): return told("LOCAL_RANK", 0)
def is_first(): return rank() == 0


def told(name, alone):
    "What torchrun tells each process; or what holds for one that is alone."
    return int(os.environ.get(f"SIFAR_{name}") or os.environ[name]) if launched() else alone


@contextmanager
def machine_first():
    "The first process of each machine goes ahead, as to download a data set; the others find it done."
    if world() == 1:
        yield
        return
    import torch.distributed as dist
    if local_rank(): dist.barrier()
    yield
    if not local_rank(): dist.barrier()


def part(rows):
    "The rows that are this process's: all of them follow each other, the parts of all ranks do, too."
    n, k = len(rows), world()
    return rows[rank() * n // k:(rank() + 1) * n // k]


def from_first(value):
    "What rank 0 has as `value`, a picklable object, in all processes."
    if world() == 1: return value
    import torch.distributed as dist
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value):
    "The list of what all ranks have as `value`, in their order, in all processes."
    if world() == 1: return [value]
    import torch.distributed as dist
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def lost(e):
    "Whether an exception says that another process of this training is gone."
    return world() > 1 and isinstance(e, RuntimeError) and any(words in str(e) for words in LOST)


def say(text):
    "A line on stderr; what several processes have to say alike, one of them says."
    who = f" (process {rank()} of {world()})" if world() > 1 else ""
    mine = True                 # where a signal comes in between, rather twice than never
    try: mine = is_new(text)
    finally:
        if mine: print(f"sifar{who}: {text}", file=sys.stderr)


def is_new(text):
    "Whether no other process has asked this for `text`, as far as the store of torchrun knows."
    if world() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True": return True
    from torch.distributed import TCPStore
    server, attempt = os.environ["MASTER_ADDR"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    try:
        store = TCPStore(server, int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5))
        return store.add(f"sifar/{attempt}/{text}", 1) == 1
    except RuntimeError: return True        # torchrun is gone
