"""Steps of several processes in turn: each has all cores while it works, and waits while another one does."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_REST = 0.3  # seconds before a step: threads of the side before spin for a while when their work is done


class Side:
    """One of the processes, started as ``python SCRIPT WORDS``, which calls :func:`answer`."""

    def __init__(self, *words: str):
        pipe = subprocess.PIPE
        environment = {"GLOG_v": "3", **os.environ}
        command = [sys.executable, *words]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def step(self) -> dict[str, Any]:
        """Have it make one step: its seconds, the loss, the peak of resident memory in bytes, and what else it says."""
        assert self.process.stdin
        assert self.process.stdout
        time.sleep(_REST)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"a side ended with {self.process.wait()}")

    def end(self) -> None:
        """No more steps."""
        self.process.communicate()


def answer(run: Callable[[], float], more: Callable[[], dict[str, Any]] = dict) -> None:
    """In such a process: a step for each line that comes in. `run` makes one and returns the loss."""
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = run()
        taken = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("answer", json.dumps({"seconds": taken, "loss": loss, "peak_bytes": peak, **more()}), flush=True)


def load_of_machine() -> float:
    """How much else runs here; said if it is too much to time anything."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is not quiet: load {load:.1f}. Times will be off, and ratios too.", flush=True)
    return load
