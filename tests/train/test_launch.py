"""Exceptions of processes that are started: told in JSON, raised again as what they were, and nothing is run for it."""

import errno
import json
from pathlib import Path

import pytest

from mindpet.train.data import DataError
from mindpet.train.fit import Diverged, Interrupted
from mindpet.train.launch import _again, _told
from mindpet.train.output_directory import CannotWrite
from mindpet.train.run import NothingDrops


class OfSomebodyElse(Exception):
    def __init__(self, where, what):
        super().__init__(f"{what} in {where}")


@pytest.mark.parametrize(
    "error",
    [
        Interrupted("stopped at step 3"),
        Diverged("loss nan"),
        DataError("line 3: no label"),
        CannotWrite("runs/a cannot be written to"),
        NothingDrops("no dropout"),
        OSError(errno.ENOSPC, "No space left on device", "runs/a/checkpoint"),
        FileNotFoundError(errno.ENOENT, "No such file", "model"),
        OSError(errno.EXDEV, "Invalid cross-device link", Path("a"), None, "b"),
        KeyError("missing"),
        ValueError("a", 2),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_is_raised_again_as_what_it_was(error):
    again = _again(**json.loads(json.dumps(_told(error))))
    assert type(again) is type(error)
    assert str(again) == str(error).replace("PosixPath('a')", "'a'")
    assert getattr(again, "exit_code", None) == getattr(error, "exit_code", None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OfSomebodyElse("a.py", "wrong"), "tests.train.test_launch.OfSomebodyElse: wrong in a.py"),
        (ValueError(object), "ValueError: <class 'object'>"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8' codec can't decode"),
    ],
)
def test_what_cannot_be_made_again_is_told_in_words(error, said):
    again = _again(**json.loads(json.dumps(_told(error))))
    assert type(again) is RuntimeError
    assert str(again).startswith(said)


@pytest.mark.parametrize("kind", ["os.system", "builtins.eval", "builtins.print", "subprocess.run", "nothing", ""])
def test_nothing_but_an_exception_is_called(kind, tmp_path):
    again = _again(kind, "message", [f"touch {tmp_path / 'made'}"])
    assert type(again) is RuntimeError
    assert "message" in str(again)
    assert list(tmp_path.iterdir()) == []
