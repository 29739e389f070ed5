"""Make up files for the readers, guided by what they reach: ``python -m fuzz [--runs 100000] [gguf e5 ...]``.

Each reader runs in a process of its own with little more memory than it needs. Findings are kept in
``runs/fuzz/<reader>``: the file, and beside it what happened. Needs the extra ``fuzz``.
"""

import argparse
import hashlib
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SPARE = 1 << 30  # bytes of address space beside what is held when all is imported and read once
ODD = (None, True, -1, 0, 1 << 63, 10**400, 1e308, float("nan"), float("inf"), "", "..", "/etc/passwd", "\0", "\ud800")
YAML = ("!!map", "!!int", "!!bool", "!!timestamp", "!!python/object:a", "&a", "*a", "<<:", "2001-13-01", "? ")
ODD += ([], {}, [[]], [None], {"a": {}}, "a" * 300, "(", "a{99999999999}", "(?i)a", 10**9, 2**31)


def main() -> int:
    """Run the readers that were named, or all, one after the other; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each reader")
    parser.add_argument("--directory", type=Path, default=Path("runs/fuzz"), help="where findings go")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if find_spec("atheris") is None:
        parser.error("atheris is not installed; it comes with the extra 'fuzz', on Linux and from Python 3.11 on")
    if arguments.one:
        fuzz(arguments.readers[0], arguments.runs, arguments.directory / arguments.readers[0])
        return 0
    from fuzz.readers import READERS

    wrong = [name for name in arguments.readers if name not in READERS]
    if wrong:
        parser.error(f"there is no reader {', '.join(wrong)}; there are {', '.join(READERS)}")
    table = {name: run(name, arguments) for name in arguments.readers or READERS}
    print(f"\n{'reader':<14}{'inputs':>10}{'findings':>10}")
    for name, (inputs, findings) in table.items():
        print(f"{name:<14}{inputs:>10}{findings:>10}")
    return int(any(findings for _, findings in table.values()))


def run(name: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """(inputs, findings) of one reader, in a process that may crash."""
    place = arguments.directory / name
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fuzz", "--one", name, "--runs", str(arguments.runs)]
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--directory", str(arguments.directory)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        inputs = findings = 0
        for line in process.stdout or ():
            if match := re.match(rf"{name}: (\d+) inputs, (\d+) findings", line):
                inputs, findings = int(match[1]), int(match[2])
                print(line, end="", flush=True)
    if process.wait() != 0:
        print(f"{name}: the process ended with {process.returncode}: see {place / 'log'}", flush=True)
        findings += 1
    return inputs, findings


def fuzz(name: str, runs: int, place: Path) -> None:
    """Give a reader so many inputs."""
    import atheris

    with atheris.instrument_imports(include=["mindpet", "yaml", "gguf"]):
        from fuzz.readers import READERS, outcome
    reader, started = READERS[name], time.monotonic()
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    corpus, work = scratch / "corpus", scratch / "work"
    corpus.mkdir(), work.mkdir()
    seeds = list(reader.seeds(work / reader.file))
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
        (work / reader.file).write_bytes(seed)
        print(name, number, *outcome(reader, work / reader.file), file=sys.stderr)
    words = sorted({word for seed in seeds for word in re.findall(rb"[A-Za-z_.]{3,30}", seed)})[:500]
    (scratch / "words").write_text("".join(f'"{word}"\n' for word in [*(word.decode() for word in words), *YAML]))
    found: set[str] = set()
    count = 0

    def try_one(data: bytes) -> None:
        nonlocal count
        count += 1
        (work / reader.file).write_bytes(data)
        where, what = outcome(reader, work / reader.file)
        if where and where not in found:
            found.add(where)
            kept = place / hashlib.sha256(data).hexdigest()[:12]
            kept.write_bytes(data)
            kept.with_suffix(".txt").write_text(f"{where}\n{what}", errors="backslashreplace")
        if count % max(1, runs // 10) == 0 or count == runs:
            seconds = time.monotonic() - started
            print(f"{name}: {count} inputs, {len(found)} findings, {seconds:.0f} seconds", flush=True)

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + SPARE, held + SPARE))
    longest = max(4096, 2 * max(map(len, seeds)))
    options = [f"-runs={runs}", f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=0", f"-dict={scratch / 'words'}"]
    options += [f"-artifact_prefix={place}/", "-seed=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], try_one, custom_mutator=lambda data, limit, seed: mutated(data, limit, seed))
    atheris.Fuzz()


def mutated(data: bytes, limit: int, seed: int) -> bytes:
    """Bytes changed by libFuzzer, or something in their JSON by one of the odd values; of safetensors in the head."""
    import atheris

    chance = random.Random(seed)
    size = int.from_bytes(data[:8], "little")
    head, framed = (data[8 : 8 + size], True) if 0 < size <= len(data) - 8 else (data, False)
    if chance.random() < 0.5:
        try:
            head = json.dumps(changed(json.loads(head), chance)).encode(errors="surrogatepass")
        except (ValueError, RecursionError):
            head = atheris.Mutate(head, limit - 8)
    else:
        head = atheris.Mutate(head, limit - 8)
    return (len(head).to_bytes(8, "little") + head + data[8 + size :] if framed else head)[:limit]


def changed(value: Any, chance: random.Random) -> Any:
    """With one thing in it replaced, taken away or written twice; a text that is JSON itself is gone into."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        if chance.random() < 0.1:
            return _without(value, key)
        value = value.copy()
        value[key] = changed(value[key], chance)
        return value
    if isinstance(value, str) and value[:1] == "{" and chance.random() < 0.95:
        return json.dumps(changed(json.loads(value), chance))
    return chance.choice(ODD)


def _without(value: Any, key: Any) -> Any:
    return {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[:key] + value[key + 1 :]


if __name__ == "__main__":
    sys.exit(main())
