"""What injection, deltas and merging cost on a network of BERT-base's size, with random weights.

python benchmarks/inject.py [--json figures.json]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import Tensor

import mindpet
from mindpet.models import BertConfig, BertForSequenceClassification


def milliseconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begun)


def resident_mib() -> float:
    """Memory that this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    network = BertForSequenceClassification(BertConfig(), num_labels=15).set_train(False)
    for parameter in network.get_parameters():
        parameter.init_data()
    config = mindpet.LoRAConfig(rank=8, alpha=16, modules_to_save=["classifier"])
    figures: dict[str, float] = {}
    inject, eject = [], []
    for _ in range(5):
        inject.append(milliseconds(lambda: mindpet.inject(network, config)))
        eject.append(milliseconds(lambda: mindpet.eject(network)))
    figures["inject_ms"], figures["eject_ms"] = statistics.median(inject), statistics.median(eject)
    before = resident_mib()
    mindpet.inject(network, config)
    figures["memory_growth_mib"] = resident_mib() - before
    delta = [parameter for parameter in network.trainable_params() if "mindpet_delta" in parameter.name]
    figures["delta_mib"] = sum(parameter.nbytes for parameter in delta) / (1 << 20)
    figures["weights_mib"] = sum(parameter.nbytes for parameter in network.get_parameters()) / (1 << 20)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in "ab":
            for parameter in delta:
                parameter.set_data(Tensor(0.05 * generator.standard_normal(parameter.shape).astype(np.float32)))
            save = [milliseconds(lambda: mindpet.save_delta(network, f"{folder}/{name}")) for _ in range(5)]
        load = [milliseconds(lambda: mindpet.load_delta(network, f"{folder}/{name}", name)) for name in "ababab"]
    figures["save_ms"], figures["load_ms"] = statistics.median(save), statistics.median(load)
    ids = Tensor(generator.integers(0, 30000, (2, 32)).astype(np.int32))
    inputs = (ids, ms.ops.ones_like(ids), ms.ops.zeros_like(ids))
    outputs = {name: mindpet.use(network, name)(*inputs).asnumpy() for name in "ab"}  # compiles once
    switch = [milliseconds(lambda: mindpet.use(network, name)) for name in "abababab"]
    figures["use_ms"] = statistics.median(switch)
    begun = time.perf_counter()
    again = mindpet.use(network, "a")(*inputs).asnumpy()
    figures["use_and_forward_ms"] = 1000 * (time.perf_counter() - begun)
    assert np.array_equal(again, outputs["a"])
    assert not np.allclose(outputs["a"], outputs["b"])
    figures["merge_ms"] = milliseconds(lambda: mindpet.merge(network))
    figures["merged_error"] = float(np.abs(network(*inputs).asnumpy() - outputs["a"]).max())
    figures["unmerge_ms"] = milliseconds(lambda: mindpet.unmerge(network))
    figures["unmerged_error"] = float(np.abs(network(*inputs).asnumpy() - outputs["a"]).max())
    for name, value in figures.items():
        print(f"{name:20} {value:.3g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
