"""Make tests/golden/adapters anew: what the library `adapters` computes for the methods that PEFT has not.

Run it where adapters 1.3.0 is installed, with the transformers 4.57 that it asks for: python
tests/golden/make_adapters.py [CASE ...]

The network is the BERT of ``peft/base``. The file of each case has the values of what was trained, the logits with
them, how many numbers train, and the gradient of the loss, under the path of the dense layer that each belongs to and
the library's own name. Named cases are made anew, and the others are left alone. ``fusion`` also has the values of the
two adapters that it fuses, which do not train.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers
from adapters.composition import Fuse
from adapters.methods.modeling import ParallelAdapter

HERE = Path(__file__).parent
INPUTS = json.loads((HERE / "peft" / "base" / "expected.json").read_text())["inputs"]
ADAPTER = {"non_linearity": "relu", "reduction_factor": 4}  # the bottleneck of a width of 8 is 2
COMPACTER = {"non_linearity": "relu", "reduction_factor": 2, "phm_dim": 2, "phm_rank": 1}
PHM = {**COMPACTER, "factorized_phm_W": False, "shared_phm_rule": False}
TOKENS = 3


def base():
    return transformers.BertForSequenceClassification.from_pretrained(HERE / "peft" / "base", num_labels=3).eval()


def with_bottlenecks(model):
    """The library's parallel adapter beside the last dense layer of each feed-forward network, as ours is placed."""
    config = adapters.ParBnConfig(**ADAPTER)
    for number, layer in enumerate(model.bert.encoder.layer):
        beside = ParallelAdapter("a", 8, 2, config)
        model.add_module(f"beside_{number}", beside)
        layer.output.dense.register_forward_hook(lambda _, given, out, beside=beside: out + beside(given[0], None)[0])
    return model


def model_of(case):
    """The network with what the case adds; everything else is frozen."""
    torch.manual_seed(2)
    model = base()
    kinds = {"adapter": adapters.DoubleSeqBnConfig(**ADAPTER), "compacter": adapters.CompacterConfig(**COMPACTER)}
    kinds |= {"phm": adapters.CompacterConfig(**PHM)}
    kinds |= {"mam": adapters.PrefixTuningConfig(flat=True, prefix_length=TOKENS)}
    before = {name for name, _ in model.named_parameters()}
    if case != "parallel_adapter":
        adapters.init(model)
    if case == "fusion":
        for name in ("a", "b"):
            model.add_adapter(name, config=adapters.DoubleSeqBnConfig(mh_adapter=False, **ADAPTER))
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.data = torch.randn_like(parameter)
        held = {name for name, _ in model.named_parameters()}
        model.add_adapter_fusion(Fuse("a", "b"), config="dynamic")
        model.active_adapters = Fuse("a", "b")
        before |= held
    elif case in kinds:
        model.add_adapter("a", config=kinds[case])
        model.set_active_adapters("a")
    if case in ("parallel_adapter", "mam"):
        with_bottlenecks(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in before
    return model.eval()


def outputs(model, case, **more):
    """A prefix takes the first positions here, as where keys and values of earlier tokens are given."""
    first = TOKENS if case == "mam" else 0
    given = {name: torch.tensor(rows) for name, rows in INPUTS.items()}
    return model(**given, position_ids=torch.arange(first, first + 6)[None], **more)


def named(case, name):
    """Path of the dense layer or of the prefix, and the library's name below it."""
    for mark in (".adapters.", ".adapter_fusion_layer."):
        if mark in name:
            path, _, rest = name.partition(mark)
            return f"{path}.dense.{rest}"
    if name.startswith("beside_"):
        number, _, rest = name.removeprefix("beside_").partition(".")
        return f"bert.encoder.layer.{number}.output.dense.a.{rest}"
    return name


def make(case):
    model = model_of(case)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        outputs(model, case, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    outputs(model, case, labels=torch.tensor([0, 2])).loss.backward()
    values = {name: p for name, p in model.named_parameters() if name in trained or ".adapters." in name}
    content = {
        "values": {named(case, name): parameter.tolist() for name, parameter in values.items()},
        "trains": sum(parameter.numel() for parameter in trained.values()),
        "gradients": {named(case, name): p.grad.tolist() for name, p in trained.items() if p.grad is not None},
        "logits": outputs(model, case).logits.tolist(),
    }
    (HERE / "adapters" / f"{case}.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    for case in sys.argv[1:] or ("adapter", "parallel_adapter", "compacter", "phm", "mam", "fusion"):
        make(case)
