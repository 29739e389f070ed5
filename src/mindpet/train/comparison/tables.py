"""What a comparison shows: one row for each method, as Markdown, CSV, JSON and a picture."""

import csv
import io
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mindpet import _files
from mindpet.train.comparison.cells import Cell
from mindpet.train.comparison.picture import draw_comparison
from mindpet.train.comparison.plan import Plan
from mindpet.train.config import RunConfig, method_config
from mindpet.train.processes import cores
from mindpet.train.summary_table import per_cent

_SHARED = ("targets", "exclude", "layers", "modules_to_save")
QUALITIES = {"accuracy": 1, "perplexity": -1}  # name to whether more is better


def quality_of(report: dict[str, Any]) -> tuple[str, float, int]:
    """(name, value, 1 if more is better and -1 if less is) of the figure that a run is judged by."""
    name = next(key for key in QUALITIES if key in report["after"])
    return name, report["after"][name], QUALITIES[name]


def collect(plan: Plan, searched: set[str], jobs: int, failures: dict[str, str]) -> dict[str, Any]:
    """Everything that is known of a comparison at this moment, read from the directories of its cells."""
    rows = [_row(name, plan.variants[name], plan.cells(name), failures) for name in plan.variants]
    for row in rows:
        row["searched"] = row["method"] in searched
    quality = next((row["quality"] for row in rows if row["quality"]), "")
    full = next((row["mean"] for row in rows if row["method"] == "full"), None)
    for row in rows:
        if row["mean"] is not None and full is not None:
            points = 100 * (row["mean"] - full) if quality == "accuracy" else 100 * (row["mean"] / full - 1)
            row["gap_to_full"] = points
    result = {
        "quality": quality,
        "model": plan.config.model.path,
        "seeds": plan.seeds,
        "rows": rows,
        "jobs": jobs,
        "machine": _machine(),
        "versions": {name: version(name) for name in ("mindpet", "mindspore", "numpy")}
        | {"python": platform.python_version()},
        "run_file": plan.config.model_dump(),
        "failures": failures,
    }
    return _strings_changed(result, plan.as_given)


def _strings_changed(value: Any, change: Callable[[str], str]) -> Any:
    """The same lists and dictionaries with every text in them changed; not their keys."""
    if isinstance(value, dict):
        return {key: _strings_changed(one, change) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strings_changed(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _row(name: str, config: RunConfig, cells: list[Cell], failures: dict[str, str]) -> dict[str, Any]:
    """One row; figures are None as long as no seed is finished."""
    reports = {cell.config.train.seed: report for cell in cells if (report := cell.report()) is not None}
    refusal = next((reason for cell in cells if (reason := cell.refusal())), "")
    failed = [str(cell) for cell in cells if str(cell) in failures]
    failed += [key for key in failures if key.startswith(f"{name}, rate")]
    if len(reports) == len(cells):
        state = "finished"
    elif refusal:
        state = "does not apply"
    else:
        state = "failed" if failed else "unfinished"
    row: dict[str, Any] = {
        "method": name,
        "state": state,
        "reason": refusal,
        "epochs": config.train.epochs,
        "max_steps": config.train.max_steps,
        "optimizer": config.train.optimizer,
        "learning_rate": config.train.learning_rate,
        "options": own_options(config),
        "seeds_finished": len(reports),
        "seeds_planned": len(cells),
        **dict.fromkeys(("quality", "mean", "deviation", "gap_to_full", "share", "trainable", "total")),
        **dict.fromkeys(("static_mib", "dynamic_mib", "seconds_per_step")),
        "seeds": reports,
        "settings": config.model_dump(include={"method", "train", "data", "model"}),
    }
    if not reports:
        return row
    found = [quality_of(report) for report in reports.values()]
    values = [value for _, value, _ in found]
    parameters = next(iter(reports.values()))["parameters"]
    static = next(iter(reports.values()))["static_memory_bytes"] / (1 << 20)
    row.update(
        quality=found[0][0],
        mean=statistics.mean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        share=parameters["share"],
        trainable=parameters["trainable"],
        total=parameters["total"],
        static_mib=static,
        dynamic_mib=statistics.mean(report["peak_memory_mib"] for report in reports.values()) - static,
        seconds_per_step=statistics.median(report["seconds_per_step"] for report in reports.values()),
    )
    return row


def own_options(config: RunConfig) -> dict[str, Any]:
    """The method's own settings: its numbers, and whatever else is not as usual; R-Drop's weight if it is on.

    >>> from mindpet.train.config import MethodSection, load_run
    >>> section = MethodSection(name="lora", rank=4, targets=["*.query"])
    >>> config = load_run(None, ["model.path=m", "data.train=d"]).model_copy(update={"method": section})
    >>> own_options(config)
    {'targets': ('*.query',), 'rank': 4, 'alpha': 16.0}
    """
    options: dict[str, Any] = {}
    if config.method.name != "full":
        filled = method_config(config.method)
        for field in fields(filled):
            value, own = getattr(filled, field.name), field.name not in _SHARED
            number = own and isinstance(value, (int, float)) and not isinstance(value, bool)
            usual = value == field.default or (not value and field.name not in config.method.options)
            if (number and value) or not (usual or number):
                options[field.name] = value
    if config.train.r_drop_alpha:
        options["r_drop_alpha"] = config.train.r_drop_alpha
    return options


def write_comparison(result: dict[str, Any], directory: Path) -> None:
    """``comparison.json``, ``.csv``, ``.md`` and, when there is a figure to draw, ``.png``; each of them whole."""
    _files.write_json(directory / "comparison.json", json.loads(json.dumps(result, default=str)))
    _files.write_text(directory / "comparison.csv", _as_csv(result))
    _files.write_text(directory / "comparison.md", as_markdown(result))
    if any(row["mean"] is not None for row in result["rows"]):
        draw_comparison(result, directory / "comparison.png")


def _as_csv(result: dict[str, Any]) -> str:
    left_out = ("seeds", "settings", "options")
    names = [name for name in result["rows"][0] if name not in left_out]
    names.insert(names.index("learning_rate") + 1, "options")
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*names, *(f"seed_{seed}" for seed in result["seeds"])])
    for row in result["rows"]:
        row = {**row, "options": in_words(row["options"])}
        values = [quality_of(row["seeds"][seed])[1] if seed in row["seeds"] else "" for seed in result["seeds"]]
        writer.writerow([*("" if row[name] is None else row[name] for name in names), *values])
    return output.getvalue()


def in_words(options: dict[str, Any]) -> str:
    """The options as people read them.

    >>> in_words({"targets": ("*.query", "*.value"), "rank": 8, "alpha": 16.0})
    'targets *.query *.value, rank 8, alpha 16'
    """
    return ", ".join(f"{key} {_shown(value)}" for key, value in options.items())


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def cells_of_row(row: dict[str, Any], quality: str) -> dict[str, str]:
    """What the table shows of a row, as text."""
    percent = quality == "accuracy"
    shown = "{:.2f}" if percent else "{:.3f}"
    factor = 100 if percent else 1
    value, gap = "", ""
    if row["mean"] is not None:
        value = shown.format(factor * row["mean"])
        value += f" ± {shown.format(factor * row['deviation'])}" if row["deviation"] is not None else ""
        if row["gap_to_full"] is not None and row["method"] != "full":
            gap = f"{row['gap_to_full']:+.2f}"
    if row["state"] != "finished":
        done = f" ({row['seeds_finished']} of {row['seeds_planned']} seeds)" if value else ""
        value = f"{value}{done}" if value else row["state"]
    memory = ""
    if row["static_mib"] is not None:
        memory = " + ".join(f"{row[key]:.{0 if row[key] >= 9.5 else 1}f}" for key in ("static_mib", "dynamic_mib"))
    return {
        "method": row["method"],
        "epochs": f"{row['max_steps']} steps" if row["max_steps"] else str(row["epochs"]),
        "optimizer": row["optimizer"],
        "learning rate": f"{row['learning_rate']:g}" + ("*" if row["searched"] else ""),
        "settings": in_words(row["options"]),
        "trains": per_cent(row["share"]) if row["share"] is not None else "",
        "memory": memory,
        "s a step": f"{row['seconds_per_step']:.3g}" if row["seconds_per_step"] is not None else "",
        quality or "quality": value,
        "gap": gap,
    }


_HEADINGS = {"trains": "trains", "memory": "static + dynamic (MiB)", "s a step": "s a step"}


def quality_heading(result: dict[str, Any]) -> tuple[str, str]:
    """Headings of the two columns of quality."""
    if result["quality"] == "perplexity":
        return "perplexity (less is better)", "gap to full (%)"
    return f"{result['quality'] or 'quality'} (%)", "gap to full (points)"


def as_markdown(result: dict[str, Any]) -> str:
    """The whole comparison to read: what was compared, the table, how to read it, what went wrong."""
    quality, gap = quality_heading(result)
    table = [cells_of_row(row, result["quality"]) for row in result["rows"]]
    headings = [_HEADINGS.get(name, name) for name in table[0]][:-2] + [quality, gap]
    data = result["run_file"]["data"]
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"# Comparison on {Path(os.path.abspath(result['model'])).name}",
        "",
        f"Model `{result['model']}`, data `{data['train']}`, seeds {', '.join(map(str, result['seeds']))}. "
        f"Trained on {_rows_in_words(result)}. {machine['processor']}, {machine['cores']} cores, {result['jobs']} run"
        f"{'s' * (result['jobs'] > 1)} at a time; {versions}.",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + " --- |" * len(headings),
        *("| " + " | ".join(_in_cell(name, value) for name, value in row.items()) + " |" for row in table),
        "",
        *notes(result),
        "",
        *(
            f"- `{row['method']}` does not apply: {' '.join(row['reason'].split())}"
            for row in result["rows"]
            if row["reason"]
        ),
    ]
    for cell, words in result["failures"].items():
        lines += ["", f"`{cell}` failed:", "", "```text", words, "```"]
    if any(row["mean"] is not None for row in result["rows"]):
        lines += ["", "![quality against the share of the parameters that train](comparison.png)"]
    return "\n".join(lines).rstrip() + "\n"


def _in_cell(column: str, value: str) -> str:
    """Patterns are full of asterisks, so settings stand as code."""
    value = value.replace("|", "\\|")
    return f"`{value}`" if column == "settings" and value else value


def notes(result: dict[str, Any]) -> list[str]:
    """How the figures are meant."""
    lines = [
        "Quality is that of the last step on the held-out rows, the same for all runs: mean ± standard deviation over "
        "the seeds.",
        "Static memory is arithmetic: weights and the optimizer's state of what trains. Dynamic memory is the peak "
        "resident memory of the run's process less that: activations, gradients, the framework itself.",
        "A step's time is the median over the steps without the first, which compiles, and over the seeds.",
    ]
    if any(row["searched"] for row in result["rows"]):
        lines.append("A learning rate with an asterisk was found on a part of the training rows, kept apart for it.")
    return lines


def _rows_in_words(result: dict[str, Any]) -> str:
    reports = [report for row in result["rows"] for report in row["seeds"].values()]
    return f"{reports[0]['rows']['train']} rows, scored on {reports[0]['rows']['test']}" if reports else "nothing yet"


def _machine() -> dict[str, Any]:
    processor = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    except (OSError, ValueError):
        names, memory = [], 0.0
    return {
        "processor": names[0] if names else processor,
        "cores": cores(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
    }
