"""What may happen to a run: kills, a full disk, no memory, a second run in its directory, a clock that goes back."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindpet.train import run
from mindpet.train.config import RunFileError, as_yaml, load_run
from mindpet.train.fit import CHECKPOINT, Interrupted, Reporter, read_metrics
from mindpet.train.output_directory import OutOfMemory, enough_memory
from mindpet.train.processes import lock_of
from tests.tiny import overrides, sentences, write_model, write_rows

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("back_to_pynative")
CHANGING = {"seconds", "samples_per_second", "tokens_per_second"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl", sentences(60))


@pytest.fixture(scope="module")
def words(inputs, tmp_path_factory, request):
    """Of the command line, after ``finetune``: a run of two dozen steps that saves after each."""
    place, mode = tmp_path_factory.mktemp("words") / "run.yaml", getattr(request, "param", "pynative")
    options = ["train.epochs=4", "train.save_every=1", f"train.mode={mode}"]
    config = load_run(None, overrides(*inputs, "nowhere", *options))
    place.write_text(as_yaml(config))
    return [str(place), "train.evaluate_every=3"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The same without faults."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    done = finetune(words, directory)
    assert done.returncode == 0, done.stderr
    return directory


def command_line(words, directory, *flags):
    return [sys.executable, "-m", "mindpet", "finetune", *words, f"output.directory={directory}", *flags]


def finetune(words, directory, *flags):
    return subprocess.run(command_line(words, directory, *flags), capture_output=True, text=True, timeout=300)


def settings(words, directory):
    return load_run(words[0], [*words[1:], f"output.directory={directory}"])


def curve(directory):
    return [
        {key: value for key, value in record.items() if key not in CHANGING}
        for record in read_metrics(directory / "metrics.jsonl")
    ]


def assert_same_end(directory, whole):
    """The curve, the delta and the last save, bit for bit; nothing that was begun and not ended."""
    assert curve(directory) == curve(whole)
    for name in ("delta/delta.safetensors", CHECKPOINT):
        ours, theirs = load_file(directory / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(value, theirs[key]) for key, value in ours.items()), name
    reports = [json.loads((each / "report.json").read_text()) for each in (directory, whole)]
    assert reports[0]["after"] == reports[1]["after"]
    assert not list(directory.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kills"),
    [
        ("pynative", 5),
        pytest.param("pynative", 100, marks=pytest.mark.exhaustive),
        pytest.param("graph", 5, marks=pytest.mark.exhaustive),
    ],
    indirect=["words"],
)
def test_kills_at_random_moments_cost_nothing(words, whole, tmp_path, kills):
    seconds = json.loads((whole / "report.json").read_text())["seconds"]["whole"]
    script = [sys.executable, str(HERE / "killed.py"), str(kills), "7", str(1.2 * seconds + 0.5), str(tmp_path), *words]
    done = subprocess.run(script, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    moments = [moment for each in runs for moment in each["kills"]]
    assert len(moments) == kills
    for each in runs:
        assert_same_end(Path(each["directory"]), whole)
    print(f"{kills} kills in {len(runs)} runs, after the steps {moments}")


def small_disk(directory, size):
    """Words that run a command with a file system of that many KiB at `directory`, which is made; or skip the test."""
    directory.mkdir()
    command = ["unshare", "-m", *([] if os.geteuid() == 0 else ["-r"]), "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size}k none {directory} && "
    tried = subprocess.run([*command, f"{mount} true"], capture_output=True) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip("no file system can be mounted here")
    return command, mount


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "frees"),
    [
        ("pynative", (24,)),
        pytest.param("pynative", (0, 12, 40, 60, 90, 200), marks=pytest.mark.exhaustive),
        pytest.param("graph", (24,), marks=pytest.mark.exhaustive),
    ],
    indirect=["words"],
)
def test_a_full_disk_is_said_and_made_room_on_the_run_goes_on(words, whole, tmp_path, frees):
    """Whatever is the file that does not fit any more."""
    directory = tmp_path / "disk"
    command, mount = small_disk(directory, 4096)
    script = tmp_path / "fill.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "free, kept, disk, words = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]\n"
        "tune = [sys.executable, '-m', 'mindpet', 'finetune', *words, f'output.directory={disk}/run']\n"
        "with open(f'{disk}/filler', 'wb') as file:\n"
        "    stat = os.statvfs(disk)\n"
        "    file.write(bytes(stat.f_bavail * stat.f_frsize - free * 1024))\n"
        "first = subprocess.run(tune, capture_output=True, text=True)\n"
        "os.remove(f'{disk}/filler')\n"
        "print('STATUS', first.returncode)\n"
        "print(first.stdout + first.stderr)\n"
        "begun = os.path.isfile(f'{disk}/run/run.yaml')\n"
        "saved = os.path.isfile(f'{disk}/run/checkpoint.safetensors')\n"
        "again = [*tune, *(['--resume'] if saved and begun else ['--overwrite'])]\n"
        "if not os.path.isfile(f'{disk}/run/report.json'):\n"
        "    subprocess.run(again, check=True)\n"
        "subprocess.run(['cp', '-r', f'{disk}/run', kept], check=True)\n"
    )
    failures = []
    for free in frees:  # KiB
        kept = tmp_path / f"kept-{free}"
        line = " ".join([sys.executable, str(script), str(free), str(kept), str(directory), *map(quoted, words)])
        done = subprocess.run([*command, mount + line], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        if "STATUS 0" not in done.stdout:
            assert "STATUS 1\n" in done.stdout
            assert "No space left on device" in done.stdout
            assert "cannot be written to" in done.stdout
            failures.append(free)
        assert_same_end(kept, whole)
    assert failures


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_full_disk_is_said_where_a_process_cannot_say_it(words, tmp_path):
    directory = tmp_path / "disk"
    command, mount = small_disk(directory, 4096)
    begun = f"grep -qs step {directory}/run/parallel/events.jsonl"
    fill = f"(until {begun}; do sleep 0.1; done; cat /dev/zero > {directory}/all) & "
    more = f"output.directory={directory}/run", "parallel.processes=2", "train.epochs=40"
    tune = " ".join([sys.executable, "-m", "mindpet", "finetune", *map(quoted, [*words, *more])])
    done = subprocess.run([*command, mount + fill + tune], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "No space is left on the disk of the output directory: make room first." in done.stdout + done.stderr


class Hungry(Reporter):
    """Asks for more memory than any machine has after the third step."""

    def step(self, record):
        if record["step"] == 3:
            np.ones(1 << 46)


def test_memory_that_does_not_suffice_is_said_and_the_run_goes_on(words, whole, tmp_path):
    config = settings(words, tmp_path / "run")
    with pytest.raises(OutOfMemory, match="The last save is intact") as raised:
        run.finetune(config, Hungry())
    said = str(raised.value).replace(str(tmp_path / "run"), "runs/a")
    page = (HERE.parents[1] / "docs" / "troubleshooting.md").read_text()
    assert "\n".join(said.splitlines()[:2]) in page
    run.finetune(config, resume=True)
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("Failed to allocate memory of 3 GB"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Device(id:0) memory isn't enough and alloc failed"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("The number of devices is not enough"), False),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), False),
        (Interrupted("Stopped; it is saved in 'out of memory test'"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_is_told_as_a_lack_of_memory(error, told, tmp_path):
    with pytest.raises(OutOfMemory if told else type(error)) as raised, enough_memory(tmp_path):
        raise error
    assert ("Nothing was saved yet: begin again with --overwrite." in str(raised.value)) == told


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_a_run_that_gets_no_more_memory_loses_nothing(words, whole, tmp_path, spare):
    """However MindSpore, its data pipeline and the tokenizer take it: some of them end the process."""
    resource = pytest.importorskip("resource")
    directory = tmp_path / "run"
    process = subprocess.Popen(
        command_line(words, directory), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and len(read_metrics(directory / "metrics.jsonl")) < 3:
        time.sleep(0.01)
    used = Path(f"/proc/{process.pid}/status").read_text().split("VmSize:")[1].split()[0]  # KiB
    limit = int(used) * 1024 + (spare << 20)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    said = process.communicate(timeout=300)[0]
    if process.returncode:
        assert "memory" in said.lower(), said
        assert finetune(words, directory, "--resume").returncode == 0
    assert_same_end(directory, whole)


def quoted(word):
    return f"'{word}'"


def test_two_runs_do_not_write_into_one_directory(words, tmp_path):
    config = settings(words, tmp_path / "run")
    lock = lock_of(tmp_path / "run", ".writer.lock")
    with pytest.raises(RunFileError, match=r"Another run writes into .*run at this moment: wait for it, or choose"):
        run.finetune(config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".writer.lock"]
    os.close(lock)
    run.finetune(config)
    assert (tmp_path / "run" / "report.json").is_file()


def test_a_second_run_that_came_too_late_is_refused(words, tmp_path, monkeypatch):
    """Both saw an empty directory; one was faster."""
    config = settings(words, tmp_path / "run")
    build = run.build_network

    def meanwhile(*given):
        monkeypatch.setattr(run, "build_network", build)
        run.finetune(config)
        return build(*given)

    monkeypatch.setattr(run, "build_network", meanwhile)
    with pytest.raises(RunFileError, match="holds a run already"):
        run.finetune(config)
    assert (tmp_path / "run" / "report.json").is_file()


def test_a_clock_that_goes_back_changes_nothing(whole, words, tmp_path, monkeypatch):
    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run.finetune(settings(words, tmp_path / "run"))
    assert_same_end(tmp_path / "run", whole)


def test_a_file_in_the_place_of_the_directory_is_said_at_once(words, tmp_path):
    (tmp_path / "run").write_text("a file")
    done = finetune(words, tmp_path / "run" / "deep")
    assert done.returncode == 2
    assert "is a file, not a directory" in done.stderr
