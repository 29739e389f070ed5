"""Time a LoRA step of BERT-base in PyNative mode beside graph mode, step by step in turn.

python benchmarks/modes.py [--rounds 7]

Printed are PyNative mode with the step under ``ms.jit``, and with each operator by itself.
"""

import argparse
import statistics
from collections.abc import Callable

from turns import Side, answer, load_of_machine

KINDS = ("graph", "jitted", "pynative")


def build(kind: str) -> Callable[[], float]:
    """A function that makes one step and returns the loss."""
    import mindspore as ms
    from against_peft import ALPHA, RANK, inputs
    from mindspore import Tensor, nn, ops

    import mindpet
    from mindpet import models
    from mindpet.train.step import SummedLoss, TrainStep

    ms.set_context(mode=ms.GRAPH_MODE if kind == "graph" else ms.PYNATIVE_MODE)
    network = models.BertForSequenceClassification(models.BertConfig(hidden_dropout_prob=0.0))
    lora = mindpet.LoRAConfig(rank=RANK, alpha=ALPHA, targets=["*.query", "*.value"], modules_to_save=("classifier",))
    mindpet.inject(network, lora)
    network.set_train()
    optimizer = nn.Adam(list(network.trainable_params()), 1e-4)
    loss = mindpet.accelerate(SummedLoss(network), compiled=kind != "pynative")
    step = TrainStep(loss, optimizer, 0.0)
    data = inputs("bert")
    ids, labels = Tensor(data["ids"]), Tensor(data["labels"])
    columns = ids, ops.ones_like(ids), ops.zeros_like(ids), labels

    @ms.jit
    def jitted(*columns):
        return step(*columns)

    call = jitted if kind == "jitted" else step
    return lambda: float(call(*columns)[0])


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        answer(build(options.work))
        return
    load_of_machine()
    sides = {kind: Side(__file__, "--work", kind) for kind in KINDS}
    for side in sides.values():  # one after the other, or they would compile at the same time
        side.step()
        side.step()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind, side in sides.items():
            times[kind].append(1000 * side.step()["seconds"])
    for kind, side in sides.items():
        side.end()
        ratio = statistics.median(mine / graph for mine, graph in zip(times[kind], times["graph"], strict=True))
        print(f"{kind}: {statistics.median(times[kind]):.0f} ms, ratio to graph mode {ratio:.2f}")


if __name__ == "__main__":
    main()
