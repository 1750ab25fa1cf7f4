"Workers that die, for tests: what joblib sends to a worker by name must be importable there"
import os, signal
from entrodrop import benchmarks

fill = benchmarks._fill_in_worker

def once(opened, cell, wait):
    "Evaluate a cell; one worker, once two cells are there, dies instead"
    marker = cell.path.parent.parent / "died"
    if len(list(cell.path.parent.glob("*.json"))) >= 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    fill(opened, cell, wait)

def always(*args): os.kill(os.getpid(), signal.SIGKILL)
