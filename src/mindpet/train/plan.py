"""What tuning a network over several devices will take, before there is one: memory, communication, strategies.

Arithmetic alone: no weights, no MindSpore. Memory follows :mod:`mindpet.train.activations`, what is sent between
devices :mod:`mindpet.train.cutting`. Dense layers of the blocks are cut over ``model_parallel`` devices; embeddings,
norms and heads are whole on each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindpet._methods import DOCUMENTED
from mindpet.train import summary
from mindpet.train.activations import (
    FEWEST_ROWS,
    Cutting,
    LayerSizes,
    Trained,
    at_the_turn,
    index_lists,
    kept_in_layer,
    layer_sizes,
    place_of,
    positions_of,
    spared_by_attention,
    spared_by_head,
)
from mindpet.train.counters import COUNTERS
from mindpet.train.cutting import (
    dense_layers,
    local_delta,
    local_size,
    own_sums,
    pattern_of,
    problems_of,
    problems_of_numbers,
    reduced,
    sent_in_layer,
    strategies_of,
)
from mindpet.train.presets import CellSizes, NetworkSizes, network_sizes, preset

# A single process on a CPU, fitted to 31 networks of 1 to 30 layers (MindSpore 2.10, Python 3.11, Linux): MiB
PROCESS = 499.5  # Python, MindSpore, mindpet, and the runtime once it has run
PROCESS_LAYER = 9.4  # what is left of compiling a layer, and what its matrix products' primitives hold
SCATTERED = 0.957  # what the memory pool spans, for each byte that is counted: some are given back before the peak


@dataclass(frozen=True)
class Plan:
    """What one device does in one step.

    Attributes:
        summary: of the whole network: what trains.
        data_parallel: parts of the batch.
        model_parallel: parts of the weights.
        cut: ``rows``, ``columns``, or None for both by turns.
        batch: samples in a step, of all devices together.
        seq: tokens in each.
        weights: bytes of the network's own weights.
        delta: bytes of what the method adds.
        optimizer: bytes of the moments.
        gradients: bytes at the update: every gradient, scaled, and the largest as it was.
        kept: bytes kept for the backward pass, by what they are.
        turn: bytes besides when the backward pass begins.
        data_sent: bytes sent in a step for data parallelism: the gradients of what trains.
        model_sent: bytes sent in a step for model parallelism, forward and backward.
        flops: floating-point operations in a step.
        strategies: pattern of paths to the arguments of ``shard``; of an adapted layer, or of a dense layer's
            ``matmul`` and ``bias_add``.
        lists: bytes of lists that MindSpore's CPU operators keep; no other device has them.
        spared: bytes that are not there on a CPU: attention keeps no weights, a frozen tied head makes no logits.
        layers: of the network.
    """

    summary: summary.Summary
    data_parallel: int
    model_parallel: int
    cut: str | None
    batch: int
    seq: int
    weights: int
    delta: int
    optimizer: int
    gradients: int
    kept: dict[str, int]
    turn: int
    data_sent: float
    model_sent: float
    flops: float
    strategies: dict[str, dict[str, tuple]]
    lists: int
    spared: int
    layers: int

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.data_parallel * self.model_parallel

    @property
    def activations(self) -> int:
        """Bytes when the backward pass begins, besides weights and moments."""
        return sum(self.kept.values()) + self.turn

    @property
    def memory(self) -> int:
        """Bytes on each device at the larger of the two peaks."""
        return self.weights + self.delta + self.optimizer + max(self.activations, self.gradients)

    @property
    def process_memory(self) -> int:
        """Bytes that a single CPU process of ours has at its peak: the above, the framework's own and the lists."""
        framework = int((PROCESS + PROCESS_LAYER * self.layers) * 2**20)
        moving = int(SCATTERED * (self.activations - self.spared + self.gradients))
        return framework + self.weights + self.delta + self.optimizer + moving + self.lists

    def seconds(self, bandwidth: float, speed: float) -> tuple[float, float]:
        """(computing, sending) in a step, at bytes a second and operations a second, one after the other."""
        return self.flops / speed, (self.data_sent + self.model_sent) / bandwidth

    def share_sent(self, bandwidth: float, speed: float) -> float:
        """Of a step's time, what is sending."""
        computing, sending = self.seconds(bandwidth, speed)
        return sending / (computing + sending)


PLANNED = (*DOCUMENTED, "qlora", "prompt_tuning", "p_tuning", "multitask_prompt_tuning", "full")


def plan(
    network: str | Mapping[str, Any],
    method: str = "lora",
    options: Mapping[str, Any] | None = None,
    *,
    batch: int = 8,
    seq: int = 2048,
    devices: int | None = None,
    data_parallel: int = 1,
    model_parallel: int = 1,
    cut: str | None = None,
    optimizer: str = "adam",
    dtype: str | None = None,
    labels: int = 2,
    kernels: bool = True,
) -> Plan:
    """Plan the tuning of a network that is not there.

    Args:
        network: a name of `mindpet.train.presets.PRESETS`, or the content of a ``config.json``.
        method: as in a run file, ``full`` among them.
        options: the method's own.
        batch: samples in a step, all devices together.
        seq: tokens in each.
        devices: if given, it must be ``data_parallel * model_parallel``.
        data_parallel: parts of the batch.
        model_parallel: parts of the weights.
        cut: ``rows`` or ``columns`` for all layers; by turns when None, so that nothing moves in between.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        dtype: of weights and activations; the network's usual one when None.
        labels: classes of the head of a BERT.
        kernels: whether :mod:`mindpet.kernels` compute, rather than MindSpore's own operators.

    Raises:
        ValueError: an unknown name, a size that cannot be cut so; everything in one message.

    >>> found = plan("glm2-6b", data_parallel=2, model_parallel=4)
    >>> found.devices, round(found.weights / 2**30, 1)
    (8, 3.7)
    """
    try:
        whole = summary.summarise(network, method, options, optimizer=optimizer, dtype=dtype, labels=labels)
    except ValueError as error:
        numbers = problems_of_numbers(batch, seq, devices, data_parallel, model_parallel, cut)
        raise ValueError("\n".join([str(error), *numbers])) from None
    content = preset(network) if isinstance(network, str) else network
    cells, sizes = network_sizes(content, labels), layer_sizes(content)
    problems = problems_of_numbers(batch, seq, devices, data_parallel, model_parallel, cut)
    if whole.method not in PLANNED:
        problems.append(f"what '{whole.method}' keeps for its gradients is not counted, only of {', '.join(PLANNED)}")
    cutting = Cutting(model_parallel, cut)
    if not problems:
        problems += problems_of(cells, sizes, cutting)
    positions = positions_of(content)
    if type(seq) is int and positions and seq > positions:
        problems.append(f"seq={seq} tokens are more than the {positions} positions of {whole.network}")
    if problems:
        raise ValueError("This cannot be planned:\n  " + "\n  ".join(problems))
    return _Planner(whole, cells, sizes, cutting, dict(options or {}), kernels).plan(data_parallel, batch, seq)


class _Planner:
    """The arithmetic, with what all of it needs."""

    def __init__(
        self,
        whole: summary.Summary,
        network: NetworkSizes,
        sizes: LayerSizes,
        cutting: Cutting,
        options: dict[str, Any],
        kernels: bool,
    ):
        self.whole, self.network, self.sizes, self.cutting, self.kernels = whole, network, sizes, cutting, kernels
        self.method, self.item = whole.method, summary.ITEM_SIZES[whole.dtype]
        self.given = summary._checked(self.method, options)
        self.by_path = {cell.path: cell for cell in network.cells}
        self.adapted = [self.by_path[path] for path in whole.adapted]
        if self.method == "full":
            self.trained = {path for cell in network.cells for path in cell.parameters()}
        else:
            selected = summary.selected_parameters(network, COUNTERS[self.method], self.given)
            self.trained = summary._saved_whole(network, self.given) | selected

    def plan(self, data_parallel: int, batch: int, seq: int) -> Plan:
        """The plan for a batch, of which each device has its part."""
        here, given = batch // data_parallel, seq
        if any(cell.kind == "prompts" for cell in self.adapted):
            seq = seq + self.given["tokens"]  # virtual tokens pass through every layer
        own = {
            (cell.path, name): local_size(cell, name, self.cutting)
            for cell in self.network.cells
            for name in cell.shapes
        }
        added = [local_delta(self.method, cell, self._added(cell), self.given, self._rank(cell), self.cutting)
                 for cell in self.adapted]  # fmt: skip
        trains = [size for (path, name), size in own.items() if f"{path}.{name}" in self.trained] + added
        layers = range(self.sizes.layers)
        kept: dict[str, int] = {}
        spared = 0
        reached = [layer for layer in layers if layer >= self._lowest()]
        for layer in reached:
            prefix = self.given["tokens"] if any(cell.kind == "slot" for cell in self.adapted) else 0
            parts = (self._trained_in(layer), here, seq, prefix)
            spared += spared_by_attention(self.sizes, *parts) * self.item if self.kernels else 0
            for name, numbers in kept_in_layer(self.sizes, *parts, self.cutting, self.kernels).items():
                kept[name] = kept.get(name, 0) + numbers * self.item
        if self.kernels and self._head_is_frozen() and here * seq >= FEWEST_ROWS:
            spared += spared_by_head(self.sizes, here, seq)
        sums = sum(own_sums(self.method, cell, self.given, self._rank(cell), self.cutting)
                   for cell in self.adapted if place_of(cell.path))  # fmt: skip
        sent = self.sizes.layers * sent_in_layer(self.sizes, 0, here * seq, self.item, self.cutting)
        if self.cutting.model_parallel > 1:
            sent += reduced(sums * here * seq * self.item, self.cutting.model_parallel)
        lists = index_lists(self.sizes, len(reached), here, seq, self.kernels)
        return Plan(
            summary=self.whole,
            data_parallel=data_parallel,
            model_parallel=self.cutting.model_parallel,
            cut=self.cutting.cut,
            batch=batch,
            seq=given,
            weights=sum(own.values()) * self.item - self.whole.saved,
            delta=sum(added) * self.item,
            optimizer=sum(trains) * summary.MOMENTS[self.whole.optimizer] * 4,
            gradients=(sum(trains) + max(trains)) * self.item,
            kept=kept,
            turn=at_the_turn(self.sizes, here, seq, self.cutting, self.item, self.kernels),
            data_sent=reduced(sum(trains) * self.item, data_parallel),
            model_sent=sent,
            flops=self._flops(here, seq, len(reached)),
            strategies=self._strategies(data_parallel),
            lists=lists,
            spared=spared,
            layers=self.sizes.layers,
        )

    def _rank(self, cell: CellSizes) -> int:
        return summary._rank_at(cell.path, self.given)

    def _added(self, cell: CellSizes) -> int:
        return COUNTERS[self.method].added(cell, {**self.given, "rank": self._rank(cell)})

    def _lowest(self) -> int:
        """The lowest layer that the backward pass reaches."""
        slots = any(cell.kind in ("slot", "prompts") for cell in self.adapted)
        paths = [*self.whole.adapted, *self.trained]
        if slots or any("embed" in path or ".wte." in path or ".wpe." in path for path in paths):
            return 0
        numbers = [int(part) for path in paths for part in path.split(".") if part.isdigit()]
        return min(numbers, default=self.sizes.layers)

    def _head_is_frozen(self) -> bool:
        """Whether the losses of a language model come from one kernel: its head is tied, and nothing in it trains.

        In graph mode, that is, and without R-Drop.
        """
        tied = self.sizes.vocabulary > 0 and not any(cell.path == "lm_head" for cell in self.network.cells)
        paths = [*self.whole.adapted, *self.trained]
        trains = any(name in path.split(".") for path in paths for name in ("embed_tokens", "wte"))
        return tied and not trains and self.item == 4

    def _trained_in(self, layer: int) -> Trained:
        """What trains there that needs its input."""
        inputs, extra, norms = set(), 0, False
        for path in self.trained:
            cell, _, name = path.rpartition(".")
            if f".{layer}." in path and self.by_path[cell].kind == "dense" and name == "weight":
                inputs.add(place_of(cell))
            norms = norms or (f".{layer}." in path and self.by_path[cell].kind == "rms_norm")
        for one in self.adapted:
            if f".{layer}." in one.path and place_of(one.path):
                outputs = one.shapes["weight"][0] // self.cutting.output_parts(place_of(one.path))
                if self.method in ("lora", "qlora"):
                    inputs.add(place_of(one.path))
                    extra += self._rank(one)
                elif self.method == "adapter":
                    extra += outputs + 2 * self.given["size"]
                else:
                    extra += outputs + 2 * (one.shapes["weight"][0] // self.given["reduction_factor"])
        return Trained(frozenset(inputs - {""}), norms, extra)

    def _flops(self, batch: int, seq: int, reached: int) -> float:
        """2 for each weight and row forward, 2 backward where it reaches, 2 for each trained weight; attention besides.

        A head's and a tied table's product count; what a method adds counts three times.
        """
        rows, parts, layers = batch * seq, self.cutting.model_parallel, self.sizes.layers
        dense = [cell for cell in self.network.cells if cell.kind == "dense" and place_of(cell.path)]
        blocks = sum(cell.parameters()[f"{cell.path}.weight"] for cell in dense) / parts
        trained = sum(
            cell.parameters()[f"{cell.path}.weight"] for cell in dense if f"{cell.path}.weight" in self.trained
        )
        attention = 4 * rows * seq * self.sizes.queries * layers / self.cutting.output_parts("x")
        head = self.sizes.hidden * self.sizes.vocabulary
        added = sum(self._added(cell) for cell in self.adapted if cell.kind == "dense") / parts
        share = reached / layers
        return 2 * rows * (blocks * (1 + share) + trained / parts + 2 * head + 3 * added) + attention * (1 + 2 * share)

    def _strategies(self, data_parallel: int) -> dict[str, dict[str, tuple]]:
        """For each kind of dense layer of the blocks, whether adapted or not."""
        adapted = {pattern_of(path) for path in self.whole.adapted}
        return {
            pattern: strategies_of(self.method if pattern in adapted else "", cell, data_parallel, self.cutting)
            for pattern, cell in dense_layers(self.network).items()
        }
