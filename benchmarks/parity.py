"""How far each method is from its oracle, and what it is made of: parity, parameters, lines of code.

python -m benchmarks.parity [--json parity.json]
    [--times times.json --comparison runs/compare/r8/comparison.json ...]

The oracles are Hugging Face PEFT and the library adapters: tests/golden holds the weights, logits and gradients of
small networks that they wrote. Printed is the largest absolute difference of the logits and of the gradients of what
trains, over all cases of a method; both are of the order of 0.1 to 1 themselves. Of prompts with an encoder
only the logits can be compared: PEFT's files do not hold the encoder.

With the times of benchmarks/methods.py and the results of `mindpet compare`, the table of docs/methods/measured.md is
printed too, and src/mindpet/train/measured.json is written, which `mindpet methods` reads.
"""

import argparse
import ast
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tests.interop import test_golden_adapters as adapters
from tests.interop import test_golden_peft as peft
from tests.oracles import difference

import mindpet
from mindpet.delta.registry import METHODS, method_of
from mindpet.graph.inject import injections

PACKAGE = Path(mindpet.__file__).parent
ADAPTERS = {"phm": "compacter", "fusion": "adapter_fusion"}
ENCODED = {"p_tuning": "p_tuning", "p_tuning_lstm": "p_tuning", "prefix_projection": "prefix"}
OTHER_ORACLES = {  # what the tests hold a method against that is in neither library, or in another one
    "low_rank_adapter": "formula",
    "bitfit": "selects",
    "qlora": "bitsandbytes",
}


def of_peft() -> dict[str, dict[str, dict[str, float]]]:
    """Differences by method and case."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in peft.CASES:
        cell = peft.load_peft(peft.network(case), peft.GOLDEN / case)
        if case in ENCODED:
            method, error = ENCODED[case], {"logits": difference(peft.logits(cell), peft.EXPECTED[case]["logits"])}
        else:
            with tempfile.TemporaryDirectory() as directory:
                method, error = (
                    method_of(injections(cell)[-1].config).name,
                    peft.differences(case, cell, Path(directory)),
                )
        found.setdefault(method, {})[case] = error
    return found


def of_lora() -> dict[str, dict[str, dict[str, float]]]:
    """The same for what computes as PEFT's LoRA does and trains otherwise: PEFT has these as optimizers."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in peft.VARIANTS:
        with tempfile.TemporaryDirectory() as directory:
            error = peft.differences_of_variant(method, peft.variant(method), Path(directory))
        found[method] = {"query_value": error}
    return found


def of_adapters() -> dict[str, dict[str, dict[str, float]]]:
    """Differences by method and case."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in adapters.CASES:
        found.setdefault(ADAPTERS.get(case, case), {})[case] = adapters.differences(case)
    return found


def lines_of_code(name: str) -> int:
    """Lines of the method's own file that are neither empty nor a comment nor documentation."""
    source = Path(str(inspect.getsourcefile(METHODS[name].config))).read_text()
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            told.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for number, line in lines if number not in told and line.strip() and line.strip()[0] != "#")


def markdown(rows: dict[str, Any], times: dict[str, Any], compared: dict[str, Any]) -> list[str]:
    """The table of the documentation, the best accuracy first."""
    head = ["method", "parity", "oracle", "trains on MiniLM", *cells(None, None), "lines"]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---|---:|---:|---:|---:|---:|"]
    for name in sorted(rows, key=lambda name: -compared.get(name, {}).get("mean", 0)):
        row, result = rows[name], compared.get(name, {})
        errors = [row[key] for key in ("logits", "gradients") if row.get(key) is not None]
        words = [
            f"[{name}]({name}.md)",
            f"{np.max(errors):.0e}" if errors else "",
            row.get("oracle") or OTHER_ORACLES[name],
            f"{result['trainable']:,} ({100 * result['share']:.3g}%)" if result else "",
            *cells(times.get(name), result).values(),
            str(row["lines"]),
        ]
        lines.append(f"| {' | '.join(words)} |")
    return lines


def cells(time: dict[str, Any] | None, result: dict[str, Any] | None) -> dict[str, str]:
    """What was measured of a method, as tables show it."""
    return {
        "static MiB": f"{result['static_mib']:.0f}" if result else "",
        "step over LoRA": f"{time['ratio_to_lora']:.2f}" if time else "",
        "R8 accuracy (%)": f"{100 * result['mean']:.2f} ± {100 * result['deviation']:.2f}" if result else "",
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--times", type=Path, default=None, help="what benchmarks/methods.py wrote with --json")
    parser.add_argument("--comparison", type=Path, nargs="+", default=(), help="what mindpet compare wrote")
    options = parser.parse_args()
    if bool(options.times) != bool(options.comparison):
        parser.error("--times and --comparison belong together")
    rows: dict[str, dict[str, Any]] = {}
    compared = {"PEFT": of_peft(), "PEFT's LoRA": of_lora(), "adapters": of_adapters()}
    print(f"{'method':24}{'oracle':13}{'cases':>6}{'logits':>10}{'gradients':>11}{'lines':>7}")
    for name in METHODS:
        row: dict[str, Any] = {"lines": lines_of_code(name)}
        oracle = next((each for each, found in compared.items() if name in found), "")
        if oracle:
            cases = compared[oracle][name].values()
            gradients = [error for case in cases for part, error in case.items() if part != "logits"]
            row |= {"oracle": oracle, "cases": len(cases), "logits": float(np.max([case["logits"] for case in cases]))}
            row["gradients"] = float(np.max(gradients)) if gradients else None
        rows[name] = row
        numbers = [f"{row[key]:.0e}" if row.get(key) is not None else "-" for key in ("logits", "gradients")]
        print(f"{name:24}{oracle or '-':13}{row.get('cases', 0):>6}{numbers[0]:>10}{numbers[1]:>11}{row['lines']:>7}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.comparison:
        times = json.loads(options.times.read_text())["methods"]
        results = [row for path in options.comparison for row in json.loads(path.read_text())["rows"]]
        found = {row["method"]: row for row in results}
        print("", *markdown(rows, times, found), sep="\n")
        measured = {name: cells(times.get(name), found.get(name)) for name in ("full", *rows)}
        (PACKAGE / "train" / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
