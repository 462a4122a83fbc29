"""Errors for people: one line that says what is wrong, where, and what to do."""
import errno
import re
from contextlib import contextmanager

from .distributed import lost

# how torch, CUDA and the systems say it
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory",
    "paging file is too small")


# what steers a terminal or turns writing round, and what of a file's name is no text
ODD = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    "`text` on one line, with escapes in place of what a terminal would obey or could not show."
    return ODD.sub(lambda found: ascii(found[0])[1:-1], text)


def is_visible(text):
    "Whether `text` can be shown as it is; so can joiners, as Persian and emoji have, and any spaces."
    return re.sub("[\u200c\u200d\xa0\u3000]", "", text).isprintable()


class UserError(Exception):
    "Something that the user can mend; `text` is the one line to show."

    def __init__(self, text):
        # kept besides `args`, which fastai rewrites of whatever passes through a callback
        self.text = visible(" ".join(text.splitlines()))
        super().__init__(self.text)


def need(ok, what):
    "Raise a UserError that says `what` is wrong, unless `ok`."
    if not ok: raise UserError(what)


def explain(e):
    "The one line for an exception that a user or a machine can cause; None for a bug of ours."
    if isinstance(e, UserError): return e.text
    if isinstance(e, ModuleNotFoundError) and e.name and not e.name.startswith("sifar"):
        return f"{e.name} is missing: pip install -r requirements.txt, or sifar again."
    if out_of_memory(e):
        what_to_do = "end other programs, or set CUDA_VISIBLE_DEVICES= to do without a GPU"
        return f"The memory of this machine, or of its GPU, is used up: {what_to_do}."
    if isinstance(e, RuntimeError) and "DataLoader worker" in str(e):       # as torch says it
        what_to_do = "look whether the memory is used up, or do without: --workers 0"
        return f"A process of --workers failed ({one_line(e)}): {what_to_do}."
    if lost(e): return "Another process ended: see what it says; a training goes on with --resume."
    # what torch.save says of a full disk
    if isinstance(e, RuntimeError) and "unexpected pos" in str(e):
        return "A disk is full, or that of temporary files: make room and run it again."
    return explain_os_error(e) if isinstance(e, OSError) else None


def explain_os_error(e):
    "The one line for an OSError."
    where = visible(f" ({e.filename})") if e.filename else ""
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what_to_do = "make room and run it again, a training with --resume"
        return f"{e.strerror}{where}: {what_to_do}; the files written before are whole."
    if e.errno in (errno.EMFILE, errno.ENFILE):
        return f"{e.strerror}: raise the limit (ulimit -n), or train with fewer --workers."
    check = ": check that the file is there and may be read and written" if e.filename else ""
    return f"{e.strerror or e}{where}{check}."


def one_line(e, most=100):
    "What an exception says, on one line of at most so many characters."
    return " ".join(str(e).split())[:most] or type(e).__name__


def out_of_memory(e):
    "Whether an exception says that the memory of the machine or of the GPU is used up."
    # fastai raises another error from a MemoryError without text, whose context that one is then
    if isinstance(e, MemoryError) or isinstance(e.__context__, MemoryError): return True
    return any(words in str(e).lower() for words in OUT_OF_MEMORY)


@contextmanager
def name_batch_size(cfg):
    "Where the memory is used up, say so with the batch size and a smaller one to try."
    try: yield
    except Exception as e:
        if not out_of_memory(e): raise
        bs = 128 if cfg.bs == "auto" else cfg.bs
        smaller = f"--bs {max(bs // 4 * 2, 2)}"                 # even, as Mixup and CutMix ask for
        what_to_do = f"try {smaller}"
        if cfg.resume: what_to_do = f"end other programs, or start a new run with {smaller}"
        raise UserError(f"Out of memory with --bs {cfg.bs}: {what_to_do}.") from e
