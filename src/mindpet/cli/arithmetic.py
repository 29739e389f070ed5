"""A summary and a plan on the screen. Nothing here imports MindSpore, so that the answers come at once."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mindpet.cli.console import console_of
from mindpet.train.plan_answer import Answer


def print_summary(title: str, rows: list[dict[str, str]], optimizer: str) -> None:
    """The table of ``mindpet summary``."""
    headings = {"weights": "weights\nMiB", "optimizer": f"{optimizer}\nMiB", "static": "both\nMiB"}
    headings |= {"trains": "parameters\nthat train", "of full": "of full\ntuning"}
    table = Table(title=Text(title), box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    console = console_of()
    for name in rows[0]:
        table.add_column(headings.get(name, name), justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        if row["share"]:
            table.add_row(*(Text(value) for value in row.values()))
    console.print(table)
    for row in rows:
        if not row["share"]:
            console.print(f"{row['method']} {row['trains']}", markup=False)


def print_plan(title: str, found: Answer) -> None:
    """What one device does, notes, and the strategies as they are pasted."""
    console = console_of()
    plan = found.plan
    ways = f"data_parallel={plan.data_parallel} x model_parallel={plan.model_parallel}"
    many = f"{plan.devices} device{'s' * (plan.devices > 1)}"
    console.print(
        Text(
            f"{title}, {plan.summary.method}, {plan.summary.dtype}: {many} ({ways}), {plan.batch} x {plan.seq} tokens"
        ),
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    for name, value in found.rows():
        table.add_row(Text(name), Text(value))
    console.print(table)
    console.print("\n".join(found.notes()), markup=False, soft_wrap=True)
    if plan.devices > 1:
        console.print("\n" + found.code(), markup=False, soft_wrap=True)
