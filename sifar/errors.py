"""Errors for people: one line that says what is wrong, where, and what to do."""
import errno
from contextlib import contextmanager


class UserError(Exception):
    "Something that the user can mend; `text` is the one line to show."

    def __init__(self, text):
        self.text = " ".join(text.splitlines())         # fastai rewrites `args` of what passes through a callback
        super().__init__(self.text)


def explain(e):
    "The one line for an exception that a user or a machine can cause; None for a bug of ours."
    if isinstance(e, UserError): return e.text
    if out_of_memory(e): return "The memory of this machine, or of its GPU, is used up: end other programs, or set CUDA_VISIBLE_DEVICES= to do without a GPU."
    if isinstance(e, RuntimeError) and "unexpected pos" in str(e): return "A disk is full, or that of temporary files: make room and run it again."          # says torch.save
    if isinstance(e, OSError):
        where = f" ({e.filename})" if e.filename else ""
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{e.strerror}{where}: make room and run it again, a training with --resume; the files written before are whole."
        return f"{e.strerror or e}{where}" + (": check that the file is there and may be read and written." if e.filename else ".")
    return None


def one_line(e, most=100):
    "What an exception says, on one line of at most so many characters."
    return " ".join(str(e).split())[:most] or type(e).__name__


def out_of_memory(e):
    "Whether an exception says that the memory of the machine or of the GPU is used up; one without text makes fastai raise another."
    return isinstance(e, MemoryError) or isinstance(e.__context__, MemoryError) or any(o in str(e).lower() for o in ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "paging file is too small"))


@contextmanager
def name_batch_size(cfg):
    "Where the memory is used up, say so with the batch size and a smaller one to try."
    try: yield
    except Exception as e:
        smaller = f"--bs {max(cfg.bs // 4 * 2, 2)}"             # even, as some options ask for
        if out_of_memory(e): raise UserError(f"Out of memory with --bs {cfg.bs}: " + (f"end other programs, or start a new run with {smaller}." if cfg.resume else f"try {smaller}.")) from e
        raise
