"""Write docs/reference/licences.md: what ``pip install 'mindpet[cli,text]'`` brings, and under which licences.

python scripts/licences.py
"""

import re
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

PLACE = Path(__file__).parent.parent / "docs" / "reference" / "licences.md"
EXTRAS = ("cli", "text")
HEADING = """# Licences

What `pip install 'mindpet[cli,text]'` brings, and the licences that the packages state in their metadata.
`scripts/licences.py` writes this page, and a test compares it with what is installed. mindpet itself is under
Apache-2.0 and contains no code of others. The packages that carry models and texts for the examples are fetched when a
target of the Makefile needs them, and are not part of it.

| package | licence |
| --- | --- |
"""


def installed(name: str, extras: tuple[str, ...] = (), found: dict[str, Distribution] | None = None) -> dict:
    """Every distribution that one of that name needs, itself included, by its normal name."""
    found = {} if found is None else found
    normal = re.sub(r"[-_.]+", "-", name).lower()
    if normal in found and not extras:
        return found
    found[normal] = distribution(name)
    for line in found[normal].requires or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            installed(needed.name, tuple(needed.extras), found)
    return found


def licence(package: Distribution) -> str:
    """What its metadata states: an expression, the classifiers, or a short text."""
    stated = package.metadata.get("License-Expression")
    classifiers = [line for line in package.metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    names = [line.rpartition(" :: ")[2].replace(" License", "") for line in classifiers]
    return stated or ", ".join(names) or (package.metadata.get("License") or "").split("\n")[0] or "not stated"


def page() -> str:
    """The whole page."""
    packages = installed("mindpet", EXTRAS)
    rows = [f"| {name} | {licence(each)} |" for name, each in sorted(packages.items()) if name != "mindpet"]
    return HEADING + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PLACE.write_text(page(), encoding="utf-8")
