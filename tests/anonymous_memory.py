"""What a process takes of memory that no file backs, for scripts that tests start."""

import ctypes
import gc
import re
import threading
import time
from pathlib import Path

import jax


def anonymous():
    """Bytes at this moment."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def settled():
    """Bytes as soon as what is free has gone back to the system."""
    gc.collect()
    sizes = [0]
    for _ in range(50):
        time.sleep(0.1)
        ctypes.CDLL(None).malloc_trim(0)
        sizes.append(anonymous())
        if abs(sizes[-1] - sizes[-2]) < 1e6:
            break
    return sizes[-1]


def peak_of(function):
    """What a function returns, and the most bytes while it runs."""
    sizes, done = [], threading.Event()

    def watch():
        while not done.wait(0.002):
            sizes.append(anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        return jax.block_until_ready(function()), max(sizes)
    finally:
        done.set()
        watching.join()
