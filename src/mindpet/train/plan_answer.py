"""A plan in words: rows for a table, notes, and the strategies as code to paste; and the documentation's table."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindpet._near import near_names
from mindpet.train.activations import positions_of
from mindpet.train.plan import Plan, plan
from mindpet.train.presets import preset

_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_RATES = {f"{unit}/s": size for unit, size in _UNITS.items()}
_SPEEDS = {f"{prefix}FLOP/s": size for prefix, size in (("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15))}
AMOUNTS = {"memory": _UNITS, "bandwidth": _RATES, "speed": _SPEEDS}
LARGEST = 1 << 24  # rows of a batch, above which nobody asks


@dataclass(frozen=True)
class Answer:
    """A plan, and what devices it is for.

    Attributes:
        plan: for one step.
        largest: batch that fits.
        memory: bytes of a device.
        bandwidth: bytes a second.
        speed: operations a second.
    """

    plan: Plan
    largest: int
    memory: float
    bandwidth: float
    speed: float

    def rows(self) -> list[tuple[str, str]]:
        """Name and value, of one device and one step."""
        plan = self.plan
        computing, sending = plan.seconds(self.bandwidth, self.speed)
        of_all = f"{plan.summary.trained:,} of {plan.summary.total:,}"
        rows = [
            ("trains, on all devices together", of_all),
            ("weights", gibibytes(plan.weights)),
            ("delta", gibibytes(plan.delta)),
            ("optimizer state", gibibytes(plan.optimizer)),
            ("gradients, at the update", gibibytes(plan.gradients)),
            ("activations, at the turn", gibibytes(plan.activations)),
            *((f"  {name}", gibibytes(size)) for name, size in plan.kept.items() if size),
            ("  the loss, or the last block's gradient", gibibytes(plan.turn)),
            ("memory of a device", gibibytes(plan.memory)),
            (f"largest batch in {self.memory / 1e9:g} GB", str(self.largest)),
            ("sent for data parallel", gibibytes(plan.data_sent)),
            ("sent for model parallel", gibibytes(plan.model_sent)),
            ("computing", f"{seconds(computing)} at {self.speed / 1e12:g} TFLOP/s"),
            ("sending", f"{seconds(sending)} at {self.bandwidth / 1e9:g} GB/s"),
            ("share of sending", f"{100 * plan.share_sent(self.bandwidth, self.speed):.1f} %"),
        ]
        if plan.devices == 1:
            rows = [row for row in rows if not row[0].startswith(("sent for", "sending", "share of sending"))]
            if plan.summary.dtype == "float32":
                rows.append(("peak of a process on a CPU", gibibytes(plan.process_memory)))
        return rows

    def notes(self) -> list[str]:
        """What the numbers do not say."""
        fits = self.plan.memory <= self.memory
        notes = [] if fits else [f"This batch does not fit into {self.memory / 1e9:g} GB."]
        if self.plan.devices > 1:
            notes.append("Embeddings, norms and heads are whole on every device; sending does not overlap computing.")
        if self.plan.devices > 4 and self.plan.devices % 8:
            notes.append("MindSpore itself wants 1, 2, 4 or a multiple of 8 devices.")
        return notes

    def code(self) -> str:
        """The strategies, to paste behind the injection; a path takes the first pattern that matches."""
        ways = f"data_parallel={self.plan.data_parallel}, model_parallel={self.plan.model_parallel}"
        lines = ["from fnmatch import fnmatchcase", "", f"# {ways}", "strategies = {"]
        for pattern, arguments in self.plan.strategies.items():
            lines.append(f'    "{pattern}": {{')
            lines += [f'        "{name}": {strategy},' for name, strategy in arguments.items()]
            lines.append("    },")
        return "\n".join([*lines, "}", *_LOOP])


_LOOP = """for path, cell in network.cells_and_names():
    given = next((given for pattern, given in strategies.items() if fnmatchcase(path, pattern)), {})
    if "matmul" in given:  # a dense layer that is not adapted
        cell.matmul.shard(given["matmul"])
        if "bias" in given:
            cell.bias_add.shard(given["bias"])
    elif given:
        cell.shard(**given)""".splitlines()


def planned(
    network: str | Mapping[str, Any],
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    amounts: Mapping[str, str],
    devices: int | None = None,
    data_parallel: int | None = None,
    model_parallel: int | None = None,
    seq: int | None = None,
    **given: Any,
) -> Answer:
    """A plan for given devices.

    Args:
        network: as :func:`mindpet.train.plan.plan` takes it, like `method`, `options` and `given`.
        method: its name.
        options: its own.
        amounts: ``memory``, ``bandwidth`` and ``speed``, with units.
        devices: if only one of the next two is given, the other follows from it; with neither, the batch is cut.
        data_parallel: parts of the batch.
        model_parallel: parts of the weights.
        seq: tokens of a sample; 2048 when None, or as many as the network has positions.
        given: the other arguments.

    Raises:
        ValueError: everything that is wrong, in one message.
    """
    problems, values = [], {}
    for name, text in amounts.items():
        try:
            values[name] = amount(name, text)
        except ValueError as error:
            problems.append(str(error))
    ways = _ways(devices, data_parallel, model_parallel)
    arguments = {**given, "seq": _tokens(network) if seq is None else seq, **ways}
    try:
        found = plan(network, method, options, devices=devices, **arguments)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return Answer(found, largest_batch(values["memory"], network, method, options=options, **arguments), **values)


def _ways(devices: int | None, data_parallel: int | None, model_parallel: int | None) -> dict[str, Any]:
    total = devices or 1
    if data_parallel is None:
        data_parallel = max(1, total // (model_parallel or 1)) if (model_parallel or 1) > 0 else 1
    if model_parallel is None:
        model_parallel = max(1, total // data_parallel) if data_parallel > 0 else 1
    return {"data_parallel": data_parallel, "model_parallel": model_parallel}


def _tokens(network: str | Mapping[str, Any]) -> int:
    """2048, or as many as there are positions; what is wrong with the network, :func:`plan` says."""
    try:
        return min(positions_of(preset(network) if isinstance(network, str) else network) or 2048, 2048)
    except (KeyError, ValueError):
        return 2048


SETTINGS = (  # of the documentation's table: network, method, data_parallel, model_parallel, batch, tokens, dtype
    ("bert-base-chinese", "lora", 1, 1, 32, 128, "float32"),
    ("bert-base-chinese", "full", 1, 1, 32, 128, "float32"),
    ("gpt2-large", "lora", 2, 1, 8, 1024, "float16"),
    ("glm2-6b", "lora", 2, 4, 8, 2048, "float16"),
    ("glm2-6b", "full", 2, 4, 8, 2048, "float16"),
    ("llama-7b", "lora", 8, 1, 8, 2048, "float16"),
    ("llama-7b", "lora", 2, 4, 8, 2048, "float16"),
    ("llama-13b", "adapter", 2, 4, 8, 2048, "float16"),
    ("llama3-8b", "lora", 2, 4, 8, 2048, "float16"),
    ("llama-70b", "lora", 1, 8, 4, 2048, "float16"),
    ("llama3-70b", "lora", 2, 8, 8, 2048, "float16"),
)


def markdown_table() -> str:
    """The documentation's table of plans, at 32 GB, 25 GB/s and 200 TFLOP/s."""
    titles = "network, method|devices|batch|weights|optimizer|activations|memory GiB|largest batch in 32 GB|sent GiB|"
    lines = [f"| {' | '.join(titles.split('|'))}sending |", "|---|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for network, method, data, model, batch, seq, dtype in SETTINGS:
        given: dict[str, Any] = {"data_parallel": data, "model_parallel": model, "seq": seq, "dtype": dtype}
        one = plan(network, method, batch=batch, **given)
        sizes = (one.weights + one.delta, one.optimizer, one.activations, one.memory)
        cells = [
            f"{network}, {method}",
            f"{data} x {model}",
            f"{batch} x {seq}",
            *(f"{size / 2**30:.2f}" for size in sizes),
            str(largest_batch(32e9, network, method, **given)),
            f"{(one.data_sent + one.model_sent) / 2**30:.2f}",
            f"{100 * one.share_sent(25e9, 200e12):.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gibibytes(size: float) -> str:
    """A size for reading.

    >>> gibibytes(3 * 2**30), gibibytes(5 * 2**20)
    ('3.00 GiB', '5.0 MiB')
    """
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def seconds(value: float) -> str:
    """A time for reading.

    >>> seconds(0.25), seconds(3)
    ('250.0 ms', '3.00 s')
    """
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def largest_batch(memory: float, network: str | Mapping[str, Any], method: str = "lora", **given: Any) -> int:
    """The largest batch of a plan that fits into so many bytes on each device; 0 if not even the smallest does.

    >>> largest_batch(32e9, "glm2-6b", data_parallel=2, model_parallel=4, seq=2048) % 2
    0
    """
    step = given.get("data_parallel", 1)

    def fits(parts: int) -> bool:
        return plan(network, method, **{**given, "batch": parts * step}).memory <= memory

    low, high = 0, 1
    while high * step <= LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def amount(name: str, text: str) -> float:
    """A number with its unit: ``32GB`` of memory, ``25GB/s`` of bandwidth, ``200TFLOP/s`` of speed.

    Raises:
        ValueError: no such unit, or not a positive number.

    >>> amount("memory", "1.5 GiB"), amount("speed", "200TFLOP/s")
    (1610612736.0, 200000000000000.0)
    """
    units = AMOUNTS[name]
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(\S*)\s*", text)
    number, unit = match.groups() if match else ("", "")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if value <= 0 or unit not in units:
        raise ValueError(
            f"'{name}' must be a positive number with one of {', '.join(units)}, but is {text!r}"
            f"{_near_unit(unit, units)}."
        )
    return value * units[unit]


def _near_unit(unit: str, units: Mapping[str, float]) -> str:
    by_lower = {one.lower(): one for one in units}
    close = [repr(by_lower[one]) for one in near_names(unit, by_lower)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
