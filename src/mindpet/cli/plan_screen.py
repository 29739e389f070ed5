"""A plan on the screen. Nothing here imports MindSpore, so that the answer comes at once."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindpet.train.plan_answer import Answer


def print_plan(title: str, found: Answer) -> None:
    """What one device does, notes, and the strategies as they are pasted."""
    console = Console(highlight=False)
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
