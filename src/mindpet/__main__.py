"""The command ``mindpet``, also as ``python -m mindpet``."""

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from mindpet.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'mindpet[cli,text]'")
    app()


if __name__ == "__main__":
    main()
