"""Compile the kernels once, with the machine's own compiler, and find them again afterwards.

Nothing happens at import. The library lies in a cache directory: ``$MINDPET_CACHE``, else ``$XDG_CACHE_HOME/mindpet``,
else ``~/.cache/mindpet``. Its name is a digest of the source, the compiler, the flags and the processor, so that a
library is never found by a machine that it was not made for.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from mindpet import _compat, _files

_log = logging.getLogger("mindpet")
_NAMES = ("rows", "attention", "dense", "narrow", "quantised", "head", "packed", "few")
_SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in _NAMES)
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("common.h", "product.h", "matrix.h"))
# NaN and infinities keep their meaning; what is given up is errno, traps, and the last bit of a sum's rounding.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"),
)
_LINK_FLAGS = ("-shared", "-pthread", "-Wl,-z,nodelete")
_MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",))  # the first that the compiler takes; -mcpu is for ARM
_VARIABLES = ("MINDPET_CACHE", "XDG_CACHE_HOME", "HOME", "CXX", "PATH", "MS_CUSTOM_AOT_WHITE_LIST")
_SECONDS = 300


class KernelsUnavailable(RuntimeError):
    """There are no kernels on this machine; the message says why."""


def available() -> bool:
    """Whether the kernels can be used here: compiles them the first time. If not, one line of the log says why."""
    return not why_not()


def why_not() -> str:
    """The reason why there are no kernels, or an empty str. ``MINDPET_KERNELS=0`` turns them off without a warning."""
    if os.environ.get("MINDPET_KERNELS") == "0":
        return "MINDPET_KERNELS is 0"
    try:
        library()
    except KernelsUnavailable as error:
        _warn(str(error))
        return str(error)
    return ""


@functools.cache
def _warn(reason: str) -> None:
    """Once for each reason."""
    _log.warning("MindSpore's own operators are used, which are slower: %s", reason)


def library() -> Path:
    """The compiled library. It is looked for once in a process; the device is asked for each time.

    Raises:
        KernelsUnavailable: another device than a CPU, no compiler, a compilation or a cache directory that fails.
    """
    if _compat.device_target() != "CPU":
        raise KernelsUnavailable(f"the kernels are for a CPU, and the device is {_compat.device_target()}.")
    if platform.system() != "Linux":
        raise KernelsUnavailable(f"MindSpore takes operators of one's own on Linux only, not on {platform.system()}.")
    found = _found(*(os.environ.get(name) for name in _VARIABLES))
    if isinstance(found, str):
        raise KernelsUnavailable(found)
    return found


@functools.cache
def _found(*_variables: str | None) -> Path | str:
    """The library, or why there is none: found out again only when a variable changes that it depends on."""
    try:
        compiler = _compiler()
        path = cache_directory() / f"kernels-{_digest(compiler)}.so"
        _check_place(path)
        if not path.is_file():
            _compile(compiler, path)
        _load(path)
    except KernelsUnavailable as error:
        return str(error)
    return path


def cache_directory() -> Path:
    """Where the library is kept."""
    given = os.environ.get("MINDPET_CACHE")
    if given:
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache").absolute() / "mindpet"
    except RuntimeError as error:  # no home
        raise KernelsUnavailable(f"there is no cache directory ({error}): set MINDPET_CACHE.") from error


def _compiler() -> list[str]:
    """``$CXX``, else g++, c++ or clang++."""
    given = shlex.split(os.environ.get("CXX", ""))
    names = [given[0]] if given else ["g++", "c++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return [found, *given[1:]]
    raise KernelsUnavailable(f"there is no C++ compiler ({', '.join(names)}).")


def _digest(compiler: list[str]) -> str:
    digest = hashlib.sha256()
    for file in (*_HEADERS, *_SOURCES):
        digest.update(file.read_bytes() + b"\0")
    flags = repr((_FLAGS, _LINK_FLAGS, _MACHINE_FLAGS))
    for text in (_run([*compiler, "--version"]), repr(compiler), flags, _processor()):
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    names = ("model name", "flags", "features", "cpu part", "cpu implementer")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.lower().startswith(names)})])


def _compile(compiler: list[str], path: Path) -> None:
    """A process of the compiler for each source, and one that links what they made."""
    try:
        with (
            _files.whole_file(path) as temporary,
            tempfile.TemporaryDirectory(
                dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True
            ) as objects,
        ):
            _log.warning("The CPU kernels are compiled into %s, once; that takes half a minute.", path.parent)
            flags = _machine_flags(compiler)
            made = {source: os.path.join(objects, f"{source.stem}.o") for source in _SOURCES}
            _run(*([*compiler, *_FLAGS, *flags, "-c", str(source), "-o", one] for source, one in made.items()))
            _run([*compiler, *_LINK_FLAGS, *made.values(), "-o", str(temporary)])
    except OSError as error:
        raise KernelsUnavailable(f"{path.parent} cannot be written to ({error}): set MINDPET_CACHE.") from error


def _machine_flags(compiler: list[str]) -> tuple[str, ...]:
    """How the compiler is told to use all of this processor: by a trial, which no failure of a source is taken for."""
    for flags in _MACHINE_FLAGS:
        try:
            _run([*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull])
        except KernelsUnavailable:
            continue
        return flags
    return ()


def _check_place(path: Path) -> None:
    """Whether MindSpore takes a library from there."""
    if ":" in str(path):
        raise KernelsUnavailable(f"MindSpore takes no library whose path has a colon ({path}): set MINDPET_CACHE.")
    allowed = os.environ.get("MS_CUSTOM_AOT_WHITE_LIST")
    if allowed and Path(os.path.realpath(allowed)) not in Path(os.path.realpath(path)).parents:
        raise KernelsUnavailable(f"{path} is outside of MS_CUSTOM_AOT_WHITE_LIST ({allowed}): set MINDPET_CACHE.")


def _load(path: Path) -> None:
    """Whether it can be loaded at all; its threads are told then how many they are."""
    try:
        ctypes.CDLL(str(path)).mindpet_threads(_threads())
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{path} cannot be loaded ({error}): delete it.") from error


def _threads() -> int:
    """``OMP_NUM_THREADS`` as the user set it (MindSpore sets it, too, where only C sees it), else all processors."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))


def _run(*commands: list[str]) -> str:
    """What the last one prints. A few run at once; when one fails, or somebody interrupts, none goes on."""
    at_once = min(4, len(os.sched_getaffinity(0)))  # a compiler takes 200 MB
    waiting, printed = list(commands), ""
    running: list[subprocess.Popen[str]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(
                    subprocess.Popen(
                        waiting.pop(0), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
                    )
                )
            printed, errors = running[0].communicate(timeout=_SECONDS)
            done = running.pop(0)
            if done.returncode:
                lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
                what = lines[0].strip() if lines else done.returncode
                raise KernelsUnavailable(f"{commands[0][0]} failed: {what}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"{commands[0][0]} cannot be run: {error}") from error
    finally:
        for process in running:
            with process:
                process.kill()
    return printed
