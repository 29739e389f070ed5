"""Time the first step of LoRA on BERT-base: compiled for the first time, and compiled by an earlier run.

python benchmarks/first_step.py

Each is a process of its own, with an empty cache directory for the graphs at first and the same one again then. The
time is that of one call, compilation and computing together; a later step is printed beside it.
"""

import argparse
import os
import tempfile
from pathlib import Path

from turns import Side, answer, load_of_machine


def main() -> None:
    """Run both, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    if parser.parse_args().work:
        from against_peft import ours

        answer(ours("bert", "lora"))
        return
    from mindpet.kernels import build

    load_of_machine()
    with tempfile.TemporaryDirectory() as place:
        if build.available():  # the kernels are there already
            (Path(place) / build.library().name).symlink_to(build.library())
        os.environ.update(MINDPET_CACHE=place, MINDPET_COMPILED="1")
        for name in ("compiled", "compiled before"):
            side = Side(__file__, "--work")
            first, _, later = (side.step() for _ in range(3))
            side.end()
            print(f"{name}: first step {first['seconds']:.1f} s, a later one {later['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
