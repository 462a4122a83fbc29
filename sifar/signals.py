"""Signals: which of them end a command, who handles them, and what is left of a closed terminal."""
import os
import signal
import stat
import threading


def ending_signals():
    "Those that end a command in good order; not the one of a closed terminal where nohup ignores it."
    hangup = getattr(signal, "SIGHUP", None)            # Windows has none
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN: return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, hangup]


def listen(signums, handler):
    "Let `handler` handle these signals; returns those that did, by signal."
    # Python allows no other thread to listen
    if threading.current_thread() is not threading.main_thread(): return {}
    return {signum: signal.signal(signum, handler) for signum in signums}


def give_back(handlers):
    "Let the signals be handled as before: `handlers` is what `listen` returned."
    for signum, handler in handlers.items(): signal.signal(signum, handler)


def leave_closed_terminal():
    "Write to nowhere from here on what goes to a terminal that is closed: it would be an error."
    with open(os.devnull, "wb") as nowhere:
        for fd in (1, 2):
            if stat.S_ISCHR(os.fstat(fd).st_mode) and not os.isatty(fd): os.dup2(nowhere.fileno(), fd)
