"""Change the code a little and see whether a test notices: ``python scripts/mutation.py [--sample 240] [delta ...]``.

A change is one of cosmic-ray's to one place of a module. The tests that pass through that line go first, those that
take least: as many as take `--seconds` together. Whatever they do not notice is a survivor, in
``runs/mutation/survivors.txt`` with its difference, to be looked at. Of a line that runs when its module is imported
it is the tests that pass through the module. Which tests pass where is measured once, by a run of them all; ``--again``
measures it anew. What was noticed already is not tried twice. Needs the extra ``measure``; see ``make mutation``.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData

HOME = Path(__file__).parents[1]
PACKAGES = ("delta", "graph", "interop")
TESTS = ("tests/delta", "tests/graph", "tests/interop", "tests/documented", "tests/test_contract.py", "tests/parallel")
UNUSED = ("VariableReplacer", "VariableInserter", "RemoveDecorator")
OPERATORS = [name for name in operator_names() if not name.endswith(UNUSED)]
UNNOTICED = ("survived", "uncovered", "error")
LIMIT = 300.0  # seconds for all tests of one change


def main() -> int:
    """Try a sample; 0."""
    parser = argparse.ArgumentParser(prog="scripts/mutation.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    parser.add_argument("--sample", type=int, default=240, help="places to change, over all packages")
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests for each")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what may notice a change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure anew which tests pass where")
    parser.add_argument("--directory", type=Path, default=HOME / "runs" / "mutation")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    passes, durations = measured(options.directory, options.tests, options.again)
    places = [
        (path, position, names)
        for package in options.packages
        for path in sorted((HOME / "src" / "mindpet" / package).glob("*.py"))
        for position, names in sorted(changes(path.read_text()).items())
    ]
    print(f"{len(places)} places, of which {min(options.sample, len(places))} are tried")
    files = {path for path, _, _ in places}
    in_functions = {str(path.relative_to(HOME)): lines_in_functions(path.read_text()) for path in files}
    through: dict[str, set[str]] = defaultdict(set)
    for (module, _), tests in passes.items():
        through[module] |= tests
    chance = random.Random(options.seed)
    log = options.directory / "tried.jsonl"
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    known = {line["key"]: line for line in lines if line["outcome"] not in UNNOTICED}
    results = []
    for path, position, names in chance.sample(places, min(options.sample, len(places))):
        name, occurrence = chance.choice(names)
        module, state = str(path.relative_to(HOME)), hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        key = f"{module}:{position[0]}:{position[1]} {name} {occurrence} {state}"
        if key not in known:
            tests = passes.get((module, position[0]), set())
            if position[0] not in in_functions[module]:
                tests = tests or through[module]
            tests = sorted(tests, key=lambda one: durations[one])
            known[key] = {
                "key": key,
                "package": path.parent.name,
                **tried(path, name, occurrence, tests, durations, options.seconds),
            }
            with open(log, "a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(f"{known[key]['outcome']:<10} {key}", flush=True)
        results.append(known[key])
    for package in options.packages:
        counts = Counter(each["outcome"] for each in results if each["package"] == package)
        print(f"{package:<8} {dict(counts)}")
    survivors = [each for each in results if each["outcome"] in UNNOTICED]
    (options.directory / "survivors.txt").write_text("\n".join(f"{each['key']}\n{each['diff']}" for each in survivors))
    return 0


def measured(
    directory: Path, tests: list[str], again: bool
) -> tuple[dict[tuple[str, int], set[str]], dict[str, float]]:
    """The tests that pass through each line of each file, and what each of them takes."""
    data, report = directory / "coverage", directory / "report.xml"
    if again or not report.exists():
        command = [sys.executable, "-m", "pytest", *tests, "-m", "not exhaustive and not slow", f"--junitxml={report}"]
        command += ["--cov=src/mindpet", "--cov-context=test", "--cov-report=", "-q"]
        command += ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
        subprocess.run(command, cwd=HOME, env={**os.environ, "COVERAGE_FILE": str(data)}, check=False)
    durations = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if len(case):  # failed or skipped
            continue
        file = case.get("classname", "").replace(".", "/") + ".py"
        durations[f"{file}::{case.get('name')}"] = float(case.get("time", 0))
    passes: dict[tuple[str, int], set[str]] = {}
    coverage = CoverageData(str(data))
    coverage.read()
    for file in coverage.measured_files():
        for line, contexts in coverage.contexts_by_lineno(file).items():
            tests = {context.partition("|")[0] for context in contexts} & durations.keys()
            passes.setdefault((str(Path(file).relative_to(HOME)), line), set()).update(tests)
    return passes, durations


def changes(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """(operator, occurrence) of every change, by (line, column); none of annotations, which nothing runs."""
    hidden = set()
    for node in ast.walk(ast.parse(source)):
        for each in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if each is not None:
                hidden.update(range(each.lineno, (each.end_lineno or each.lineno) + 1))
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    tree = get_ast(source)
    for name in OPERATORS:
        positions = Positions(get_operator(name)())
        positions.walk(tree)
        for occurrence, position in enumerate(positions.found):
            if position[0] not in hidden:
                found.setdefault(position, []).append((name, occurrence))
    return found


def lines_in_functions(source: str) -> set[int]:
    """The lines of bodies of functions: the rest runs when the module is imported."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.Lambda))
    bodies = (node.body if isinstance(node.body, list) else [node.body] for node in functions)
    return {line for body in bodies for line in range(body[0].lineno, (body[-1].end_lineno or 0) + 1)}


class Positions(Visitor):
    """Where an operator of cosmic-ray has something to change, in its own order."""

    def __init__(self, operator):
        self.operator, self.found = operator, []

    def visit(self, node):
        self.found += [start for start, _ in self.operator.mutation_positions(node)]
        return node


def tried(path: Path, name: str, occurrence: int, tests: list, durations: dict, limit: float) -> dict:
    """What became of one change."""
    source = path.read_text()
    changed = mutate_code(source, get_operator(name)(), occurrence) or source
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=1)
    diff = "\n".join(list(lines)[2:])
    chosen, seconds = [], 0.0
    for test in tests:
        if chosen and seconds + durations[test] > limit:
            break
        chosen.append(test)
        seconds += durations[test]
    if not chosen:
        return {"outcome": "uncovered", "diff": diff}
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(HOME / "src", Path(place) / "src", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(place) / path.relative_to(HOME)).write_text(changed)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", *chosen]
        environment = {**os.environ, "PYTHONPATH": f"{place}/src:{HOME}", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, timeout=LIMIT, check=False)
            # 2 and 4: the tests cannot be imported any more
            outcome = {0: "survived", 1: "killed", 2: "killed", 4: "killed"}.get(done.returncode, "error")
        except subprocess.TimeoutExpired:
            outcome = "timed out"
    return {"outcome": outcome, "tests": len(chosen), "of": len(tests), "diff": diff}


if __name__ == "__main__":
    sys.exit(main())
