"""One of several processes that train together: every run that ``runs.json`` describes. Started by msrun."""

import json
import sys
from pathlib import Path

import mindspore as ms

from mindpet.train import run
from mindpet.train.config import load_run


def main() -> None:
    """Each run in the directory of its name."""
    ms.set_device("CPU")
    directory = Path(sys.argv[1])
    for name, overrides in json.loads((directory / "runs.json").read_text()).items():
        run.finetune(load_run(None, [*overrides, f"output.directory={directory / name}"]))


if __name__ == "__main__":
    main()
