"""Text that appears as it is generated."""

import json
import os
import sys
from contextlib import AbstractContextManager
from typing import Any

import typer

from mindpet.models.generation import Generation, TextStream
from mindpet.train.processes import on_signals, restore

_WHY = {
    "end": "it ended by itself",
    "stop": "a stop text came",
    "max_tokens": "--max-tokens is reached",
    "positions": "the model has no more positions",
    "interrupted": "interrupted",
}


def print_stream(stream: TextStream, as_json: bool, about: dict[str, Any]) -> Generation:
    """Print a text while it is generated, or JSON of it and `about` at the end; figures go to stderr.

    The first SIGINT or SIGTERM ends it after its present token, the second at once.
    """
    with _stopped_by_signal(stream):
        for piece in stream:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    result = stream.result
    typer.echo(json.dumps({**about, **result.as_record()}, ensure_ascii=False) if as_json else "")
    compiled = f", {result.compile_seconds:.1f} s of compiling" if result.compile_seconds else ""
    rate = f" at {result.tokens_per_second:.1f} tokens/s" if result.seconds else ""
    typer.echo(
        f"{len(result.tokens)} tokens{rate}, after a prompt of {len(result.prompt)} tokens in "
        f"{result.prompt_seconds:.1f} s{compiled}; {_WHY[result.stopped]}.",
        err=True,
    )
    return result


def _stopped_by_signal(stream: TextStream) -> AbstractContextManager[None]:
    def handle(number: int, before: dict[int, Any]) -> None:
        restore(before)
        stream.stop()

    return on_signals(handle)


def ended_at_once() -> AbstractContextManager[None]:
    """A signal ends the process: nothing is lost, and MindSpore answers an exception while it compiles with pages."""

    def handle(number: int, before: dict[int, Any]) -> None:
        typer.echo("Interrupted.", err=True)
        os._exit(130)

    return on_signals(handle)
