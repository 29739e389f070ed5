"""Write constraints.txt: the versions that the tests run with, for each supported Python.

python scripts/lock.py python3.10 python3.11 python3.12
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def frozen(python: str) -> tuple[str, dict[str, str]]:
    """(version of Python, package to version) after a fresh install of everything that the tests need."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = f"{folder}/bin/python"
        subprocess.run([inside, "-m", "pip", "install", "-q", f"{ROOT}[dev,fuzz,measure]"], check=True)
        listing = subprocess.run([inside, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        name = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = subprocess.run([inside, "-c", name], check=True, capture_output=True, text=True).stdout.strip()
    pins = dict(line.split("==") for line in listing.splitlines() if "==" in line)
    return version, pins


def main() -> None:
    """Merge what each interpreter named on the command line gets."""
    by_python = dict(frozen(python) for python in sys.argv[1:])
    lines = ["# Written by scripts/lock.py: the versions that the tests run with."]
    for package in sorted({name for pins in by_python.values() for name in pins}, key=str.lower):
        versions: dict[str, list[str]] = {}
        for python, pins in by_python.items():
            if package in pins:
                versions.setdefault(pins[package], []).append(python)
        for version, pythons in versions.items():
            everywhere = len(versions) == 1
            marker = " or ".join(f'python_version == "{python}"' for python in pythons)
            lines.append(f"{package}=={version}" + ("" if everywhere else f" ; {marker}"))
    (ROOT / "constraints.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
