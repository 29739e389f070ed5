"""Kill a run at random moments and go on with it, again and again, in processes that are forked: ready in no time.

    python killed.py KILLS SEED SECONDS DIRECTORY OVERRIDE...

Each run is killed within so many seconds after its beginning, and gone on with until it ends by itself; then another
one begins. Printed is a JSON list: for each run its directory, and for each kill the last step that was written down.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import mindspore  # noqa: F401  so that it is there in every process

from mindpet.cli.app import app
from mindpet.train.fit import CHECKPOINT, read_metrics


def begin(words: list[str], log: Path) -> int:
    """A process that runs the command line with these words; its number."""
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            app(words, standalone_mode=False)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    return child


def way_on(directory: Path) -> list[str]:
    """How to go on: the words that a person would take."""
    if not (directory / "run.yaml").is_file():
        return []
    return ["--resume"] if (directory / CHECKPOINT).is_file() else ["--overwrite"]


def main() -> None:
    """Kill, go on, print."""
    kills, seed, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    place, overrides = Path(sys.argv[4]), sys.argv[5:]
    moments = random.Random(seed)
    runs: list[dict] = []
    done = 0
    while done < kills or not runs[-1]["ended"]:
        if not runs or runs[-1]["ended"]:
            runs.append({"directory": str(place / f"run-{len(runs)}"), "kills": [], "ended": False})
        directory = Path(runs[-1]["directory"])
        words = ["finetune", *overrides, f"output.directory={directory}", *way_on(directory)]
        child = begin(words, place / "output.txt")
        if done < kills:
            time.sleep(moments.uniform(0, seconds))
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                records = read_metrics(directory / "metrics.jsonl")
                runs[-1]["kills"].append(records[-1]["step"] if records else -1)
                done += 1
                continue
            # it ended by itself, or with an error: the report says which
        else:
            os.waitpid(child, 0)
        if not (directory / "report.json").is_file():
            sys.exit((place / "output.txt").read_text()[-3000:])
        runs[-1]["ended"] = True
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
