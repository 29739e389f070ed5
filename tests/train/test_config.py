import pytest
import yaml

from mindpet.train.config import RunConfig, RunFileError, as_yaml, load_run, method_config, template

NEEDED = ["model.path=m", "data.train=d.jsonl"]


def test_overrides_go_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata: {train: d}\ntrain: {epochs: 7, batch_size: 4}\n")
    config = load_run(path, ["train.epochs=9", "method.rank=2"])
    assert (config.train.epochs, config.train.batch_size, config.train.accumulate) == (9, 4, 1)
    assert method_config(config.method).rank == 2


def test_the_template_is_a_valid_run_file_that_means_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(template("m", "d.jsonl"))
    config = load_run(path)
    expected = load_run(None, [*NEEDED, "method.rank=8", "method.alpha=16"])
    assert config == expected


def test_the_template_explains_every_key():
    text = template()
    for section in RunConfig.model_fields.values():
        for key, field in section.annotation.model_fields.items():
            assert f"  {key}:" in text
            assert field.description
            assert field.description in text


def test_the_resolved_file_reads_back_the_same(tmp_path):
    config = load_run(None, [*NEEDED, "method.targets=['*.query']", "train.learning_rate=1e-3"])
    (tmp_path / "run.yaml").write_text(as_yaml(config))
    assert load_run(tmp_path / "run.yaml") == config
    assert yaml.safe_load(as_yaml(config))["method"]["targets"] == ["*.query"]


def test_every_problem_is_in_one_message():
    with pytest.raises(RunFileError) as error:
        load_run(
            None,
            [
                "train.epoch=3",
                "data.trian=x",
                "train.batch_size=many",
                "train.seed=-1",
                "nonsense",
                "method.name=lorra",
            ],
        )
    message = str(error.value)
    for part in (
        "8 problems",
        "there is no method 'lorra'",
        "train.epoch: there is no such key; did you mean 'epochs'?",
        "data.trian: there is no such key; did you mean 'train'?",
        "train.batch_size: ",
        "'many'",
        "train.seed: ",
        "data.train: is needed",
        "model: is needed",
        "'nonsense' is not section.key=value",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.name=loar", "did you mean lora?"),
        ("method.rnak=3", "did you mean 'rank'?"),
        ("method.rank=0", "'rank' must be a positive int, but got 0"),
        ("method.dropout=2.0", "'dropout' must be in \\[0, 1\\)"),
        ("train.optimizer=adm", "train.optimizer"),
        ("train.mode=fast", "train.mode"),
        ("data.holdout=1.5", "whole number of rows"),
        ("output.dir=x", "did you mean 'directory'?"),
        ("modle.path=x", "did you mean 'model'?"),
        ("train.epochs=true", "train.epochs"),
        ("train.learning_rate=.inf", "train.learning_rate"),
        ("train.seed=99999999999", "train.seed"),
        ("data.holdout=.inf", "data.holdout"),
        ("method.targets=5", "'targets' must be a pattern or a list of them, but got 5"),
        ("method.layers=[-1]", "'layers' must be numbers from 0 on"),
        ("method.layers=[true]", "'layers' must be numbers from 0 on, but got True"),
    ],
)
def test_a_wrong_value_is_explained(override, says):
    with pytest.raises(RunFileError, match=says):
        load_run(None, [*NEEDED, override])


def test_another_method_on_the_command_line_leaves_the_options_of_the_first(tmp_path, caplog):
    path = tmp_path / "run.yaml"
    path.write_text(template("m", "d.jsonl"))
    assert load_run(path, ["method.name=full"]).method.options == {}
    assert load_run(path, ["method.name=adapter", "method.size=4"]).method.options == {"size": 4}
    assert caplog.messages == [
        f"The file's options of lora are left out, {name} has its own defaults: rank, alpha"
        for name in ("full", "adapter")
    ]
    assert load_run(path, ["method.name=lora"]).method.options == {"rank": 8, "alpha": 16}
    load_run(path, ["method.name=dora", "method.rank=2"])
    assert caplog.messages[2].endswith("dora has its own defaults: alpha")
    with pytest.raises(RunFileError, match="did you mean lora"):
        load_run(path, ["method.name=lorra"])
    assert len(caplog.messages) == 3


def test_options_of_full_are_refused():
    with pytest.raises(RunFileError, match="'full' has no options"):
        load_run(None, [*NEEDED, "method.name=full", "method.rank=2"])


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "!!python/object/apply:os.system ['true']", "\x00"])
def test_what_is_not_a_run_file_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(RunFileError, match="run.yaml"):
        load_run(path)


def test_a_missing_run_file_names_its_neighbours(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(RunFileError, match="near it: run.yaml"):
        load_run(tmp_path / "rum.yaml")


def test_numbers_are_read_as_people_write_them():
    config = load_run(None, [*NEEDED, "method.dropout=1e-1", "method.alpha=1e1", "train.learning_rate=1e-3"])
    assert (method_config(config.method).dropout, method_config(config.method).alpha) == (0.1, 10.0)
    assert config.train.learning_rate == 0.001


def test_one_pattern_is_a_list_of_one():
    config = method_config(load_run(None, [*NEEDED, "method.exclude='*.0.*'", "method.targets='*.query'"]).method)
    assert (config.exclude, config.targets) == (("*.0.*",), ("*.query",))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata: {train: d}\ntrain:\n  epochs: 3\n  epochs: 4\n")
    with pytest.raises(RunFileError, match="'epochs' stands twice"):
        load_run(path)


def test_the_names_of_methods_are_those_of_the_registry():
    from mindpet.delta.registry import METHODS
    from mindpet.train.config import METHOD_NAMES

    assert {*METHODS, "full"} == set(METHOD_NAMES)
