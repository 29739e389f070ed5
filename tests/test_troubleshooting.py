"""The messages that docs/troubleshooting.md quotes are those that are raised."""

import json
import re
from pathlib import Path

import mindspore as ms
import pytest
from mindspore import nn, ops
from typer.testing import CliRunner

import mindpet
from mindpet.cli.app import app
from mindpet.delta import AdapterDense, LoRADense
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta
from tests import tiny

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
SOURCE = Path(mindpet.__file__).parent
QUOTED = [" ".join(block.split()) for block in re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.M | re.S)]


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.query = nn.Dense(8, 8)
        self.value = nn.Dense(8, 8)

    def construct(self, x):
        return x + self.query(x) * self.value(x)


def plain():
    return nn.SequentialCell(Block(), Block(), nn.Dense(8, 3))


def tuned(config=None):
    return mindpet.inject(plain(), config or mindpet.LoRAConfig(rank=2, targets=["*.query"]))


def twice():
    mindpet.inject(tuned(), mindpet.LoRAConfig(targets=["*.query"]))


def adapted():
    return tuned(mindpet.AdapterConfig(targets=["0.query"]))


def merged():
    mindpet.save_delta(mindpet.merge(tuned()), "never")


def suspended():
    network = tuned()
    with mindpet.disable(network):
        mindpet.save_delta(network, "never")


def empty():
    network = plain()
    for parameter in network.get_parameters():
        parameter.requires_grad = False
    nn.Adam(network.trainable_params())


def swapped():
    class Outer(nn.Cell):
        def __init__(self):
            super().__init__()
            self.one, self.two = Block(), Block()

    network = Outer()
    nn.Adam(network.trainable_params())
    for block in (network.one, network.two):
        block.q = LoRADense(4, 4, lora_rank=2, lora_alpha=4)
    freeze_delta(network, "lora")
    nn.Adam(network.trainable_params())


def other_base():
    mindpet.save_delta(tuned(), "d")
    mindpet.load_delta(nn.SequentialCell(Block(), nn.Dense(8, 3)), "d")


def other_weights():
    mindpet.save_delta(tuned(), "h", hash_weights=True)
    mindpet.load_delta(plain(), "h")


def other_method():
    mindpet.save_delta(tuned(), "d")
    mindpet.load_delta(adapted(), "d")


def changed_peft(**keys):
    mindpet.save_peft(tuned(), "q")
    path = Path("q/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    mindpet.load_peft(plain(), "q")


def other_peft():
    mindpet.save_peft(tuned(), "p")
    mindpet.load_peft(nn.SequentialCell(Block()), "p")


def semi_auto():
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=8)
    try:
        nn.Dense(8, 8)(ops.ones((8, 8)))
    finally:
        ms.reset_auto_parallel_context()
        ms.set_context(mode=ms.PYNATIVE_MODE)


CASES = {
    "target": lambda: mindpet.inject(plain(), mindpet.LoRAConfig(targets=["query"])),
    "twice": twice,
    "head": lambda: mindpet.inject(plain(), mindpet.LoRAConfig(targets=["0.query"], modules_to_save=["classifier"])),
    "bfloat16": lambda: LoRADense(8, 8, 2, 4, compute_dtype=ms.bfloat16)(ops.ones((2, 8))),
    "dropout": lambda: LoRADense(8, 8, 2, 4, lora_dropout=0),
    "nothing to freeze": lambda: freeze_delta(plain(), "lora"),
    "nothing trains": empty,
    "swapped": swapped,
    "relative": lambda: TrainableParamsCheckPoint("saved"),
    "merged": merged,
    "suspended": suspended,
    "no merge": lambda: mindpet.merge(adapted()),
    "other base": other_base,
    "other weights": other_weights,
    "other method": other_method,
    "bias on B": lambda: changed_peft(lora_bias=True),
    "unknown key": lambda: changed_peft(use_brand_new=3),
    "other network": other_peft,
    "not of PEFT": lambda: mindpet.save_peft(adapted(), "never"),
    "misspelled": lambda: AdapterDense(8, 8).shard(strategy_residential_add=((2, 1), (2, 1))),
    "no cut": lambda: mindpet.shard_like(tuned()),
    "semi-auto": semi_auto,
}
RUN_FILE = "model: {pth: model}\ndata: {train: rows.jsonl}\ntrain: {epochs: 1.5, learning_rate: -1}\n"


# what a quote ends or goes on with that takes a run, a full disk or no compiler: where it is said, and asserted with it
ELSEWHERE = {
    "Another run writes into": "train/output_directory.py",
    "There was not enough memory.": "train/output_directory.py",
    "cannot be written to: ": "train/output_directory.py",
    "is intact. Try a lower train.learning_rate than": "train/fit.py",
    "has changed since the run, so which rows were held out is not known any more": "train/run.py",
    "there is no C++ compiler (": "kernels/build.py",
}
OF_OTHERS = (
    "OSError: Mindspore can not compile",
    "For 'load_param_into_net'",
    "A module that was compiled using NumPy 1.x",
)
ON_THE_COMMAND_LINE = (  # the test of these messages is below
    "4 problems in bad.yaml",
    "data.prompt, data.packing: not for a classifier",
    "train.r_drop_alpha compares two passes",
    "rows.jsonl has no usable row.",
    "runs/a holds a run already",
    "The run in runs/a is finished",
)


def test_every_quoted_message_is_what_is_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left, wrong = set(QUOTED), []
    for name, case in CASES.items():
        with pytest.raises(Exception) as raised:  # of every kind: the message is what counts
            case()
        message = " ".join(str(raised.value).split())
        quotes = {quoted for quoted in QUOTED if message.startswith(quoted)}
        left -= quotes
        if not quotes:
            wrong.append(f"{name}: {message}")
    assert not wrong
    left = {quoted for quoted in left if not quoted.startswith((*OF_OTHERS, *ON_THE_COMMAND_LINE))}
    said = {quoted for quoted in left if any(part in quoted for part in ELSEWHERE)}
    assert left == said, "nothing raises these"
    assert len(said) == len(ELSEWHERE), "a page has lost a message, or has one twice"
    for part, file in ELSEWHERE.items():
        source = re.sub(r'"\s*f?"', "", (SOURCE / file).read_text())  # a text over several lines
        assert part in source, part


def test_the_quoted_problems_of_a_run_file_are_those_that_are_found(tmp_path, monkeypatch):
    from mindpet.train.config import RunFileError, load_run

    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(RUN_FILE)
    with pytest.raises(RunFileError) as raised:
        load_run("bad.yaml")
    assert " ".join(str(raised.value).split()) in QUOTED


def test_an_optimizer_made_too_early_trains_nothing():
    network = nn.SequentialCell(Block(), nn.Dense(8, 3))
    optimizer = nn.Adam(network.trainable_params(), 0.1)
    mindpet.inject(network, mindpet.LoRAConfig(rank=2, targets=["*.query"]))
    before = {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.CrossEntropyLoss()), optimizer)
    step(ops.ones((4, 8)), ms.Tensor([0, 1, 2, 0], ms.int32))
    assert all((parameter.asnumpy() == before[parameter.name]).all() for parameter in network.get_parameters())


def test_the_quoted_messages_of_the_command_line_are_those_that_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    tiny.write_model(Path("model"))
    tiny.write_language_model(Path("language"))
    tiny.write_rows(Path("rows.jsonl"), tiny.sentences(60))
    Path("text.txt").write_text(tiny.stories(40))
    short = tiny.overrides("model", "rows.jsonl", "runs/a", "train.mode=pynative", "train.epochs=1")
    CliRunner().invoke(app, ["config", "init", "run.yaml"])

    def told(*words, code):
        result = CliRunner().invoke(app, [words[0], "run.yaml", *short, *words[1:]])
        assert result.exit_code == code, result.output
        said = " ".join(result.output.replace(f"{tmp_path}/", "").split())
        assert any(quoted in said for quoted in QUOTED), said

    told("finetune", "data.label=topic", code=2)
    told("finetune", "data.prompt=x", "data.packing=false", code=2)
    told("finetune", "model.path=language", "data.train=text.txt", "data.holdout=10", "train.r_drop_alpha=1", code=3)
    assert CliRunner().invoke(app, ["finetune", "run.yaml", *short]).exit_code == 0
    told("finetune", code=2)
    told("finetune", "--resume", code=2)
