"""Workers that die, for tests: what joblib sends to a worker by name must be importable there."""
import os
import signal

from entrodrop import benchmarks

fill = benchmarks.fill_cell


def once(at, store, cell, wait):
    "Evaluate a cell; one worker, once two cells are there, dies instead"
    marker = store.folder.parent / "died"
    if len(store.singles()) >= 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    fill(at, store, cell, wait)


def always(*args): os.kill(os.getpid(), signal.SIGKILL)
