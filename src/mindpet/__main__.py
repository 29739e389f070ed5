"""The command ``mindpet``, also as ``python -m mindpet``."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line, or say what to install for it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        from mindpet.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'mindpet[cli,text]'")
    app()


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C ends an import at once: MindSpore aborts, with a page of its own, when one is left half done."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"Interrupted.\n")
            os._exit(130)
        frame = frame.f_back
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    main()
