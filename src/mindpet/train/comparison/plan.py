"""What a comparison consists of: its rows, what their runs have in common, and all that is wrong with it at once."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mindpet._methods import DOCUMENTED
from mindpet._near import near
from mindpet.delta.registry import METHODS, method_named
from mindpet.train import run
from mindpet.train.comparison.cells import Cell
from mindpet.train.config import RunConfig, RunFileError, _in_words, method_problems
from mindpet.train.rate import peak_learning_rate, with_rate

R_DROP = "r_drop"
R_DROP_ALPHA = 4.0  # the default of RDropLoss, for run files that give none


@dataclass(frozen=True)
class Plan:
    """What a comparison consists of.

    Attributes:
        config: the run file, its paths made absolute.
        given: the run file as it stands.
        directory: where everything goes.
        variants: name of each row to what its runs have in common.
        seeds: one run for each.
    """

    config: RunConfig
    given: RunConfig
    directory: Path
    variants: dict[str, RunConfig]
    seeds: list[int]

    def cells(self, name: str) -> list[Cell]:
        """The runs of one row."""
        return [self._cell(name, f"seed {seed}", f"seed-{seed}", self.variants[name], seed) for seed in self.seeds]

    def search_cells(self, name: str, data: dict[str, Any]) -> list[Cell]:
        """The runs that look for the row's learning rate, on the rows that `data` names."""
        cells = []
        common = self.variants[name]
        for factor in dict.fromkeys(self.config.compare.grid):
            rate = float(f"{peak_learning_rate(common) * factor:.3g}")
            config = changed(common, data=data, train={"learning_rate": rate})
            place = f"search/rate-{rate:g}"
            cells.append(self._cell(name, f"rate {rate:g}", place, config, self.config.train.seed))
        return cells

    def as_given(self, text: str) -> str:
        """A text with this run file's paths as the run file has them: a published table says nothing of a machine."""
        pairs = {self.config.model.path: self.given.model.path}
        pairs[self.config.output.directory] = self.given.output.directory
        pairs[self.config.data.train] = self.given.data.train
        if self.config.data.test and self.given.data.test:
            pairs[self.config.data.test] = self.given.data.test
        for absolute, given in sorted(pairs.items(), key=lambda pair: -len(pair[0])):  # the inner ones first
            if not Path(given).is_absolute():
                parts = re.split(rf"(?<![\w./-]){re.escape(absolute)}(?![\w-])", text)
                text = given.rstrip("/").join(parts)
        return text

    def with_changes(self, names: list[str], **sections: dict[str, Any]) -> "Plan":
        """The plan with other values in those rows."""
        new = {name: changed(self.variants[name], **sections) for name in names}
        return replace(self, variants={**self.variants, **new})

    def _cell(self, variant: str, name: str, place: str, config: RunConfig, seed: int) -> Cell:
        directory = str(self.directory / variant / place)
        return Cell(variant, name, changed(config, train={"seed": seed}, output={"directory": directory}))


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The run with other values in it, which are checked already."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def variant_named(word: str) -> str:
    """The name of a row: a method, ``METHOD+r_drop``, or ``r_drop``, which is full fine-tuning with it.

    Raises:
        ValueError: no such method.

    >>> variant_named("LoRA+r_drop"), variant_named("full+r_drop"), variant_named("prefixtuning")
    ('lora+r_drop', 'r_drop', 'prefix')
    """
    method, plus, more = word.strip().lower().partition("+")
    aliases = {alias: one.name for one in METHODS.values() for alias in (one.name, *one.aliases)}
    known = [*METHODS, "full", R_DROP, *(f"{name}+{R_DROP}" for name in METHODS)]
    if (plus and more != R_DROP) or (plus and method == R_DROP) or method not in {*aliases, "full", R_DROP}:
        listed = ", ".join([*METHODS, "full"]) + f", each also with +{R_DROP}"
        raise ValueError(f"there is no {word!r}: the methods are {listed}{near(word.strip(), known)}")
    if method in ("full", R_DROP):
        return R_DROP if plus or method == R_DROP else "full"
    return aliases[method] + plus + more


def make_plan(config: RunConfig, methods: list[str] | None = None, seeds: list[int] | None = None) -> Plan:
    """What ``compare`` of the run file means; `methods` and `seeds` go over it.

    Raises:
        RunFileError: with every problem: unknown methods, settings that no run can have.
    """
    section, problems = config.compare, list[str]()
    names = _names(methods or section.methods or [*DOCUMENTED, "full"], "compare.methods", problems)
    settings: dict[str, dict[str, Any]] = {}
    for word, values in section.settings.items():
        for name in _names([word], "compare.settings", problems):
            settings.setdefault(name, {}).update(values)
    given, config = config, run.with_absolute_paths(config)
    checked = {name: _variant(config, name, settings, problems) for name in dict.fromkeys([*names, *settings])}
    chosen = list(dict.fromkeys(section.seeds if seeds is None else seeds))
    problems += [f"seeds: {seed} is not from 0 to 2**32 - 1" for seed in chosen if not 0 <= seed < 2**32]
    if not chosen:
        problems.append("seeds: one at least is needed")
    if problems:
        problems = list(dict.fromkeys(problems))
        raise RunFileError(f"{len(problems)} problem{'s' * (len(problems) > 1)}:\n  " + "\n  ".join(problems))
    return Plan(config, given, Path(config.output.directory), {name: checked[name] for name in names}, chosen)


def _names(words: list[str], where: str, problems: list[str]) -> list[str]:
    names = []
    for word in words:
        try:
            names.append(variant_named(word))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return list(dict.fromkeys(names))


def _variant(config: RunConfig, name: str, settings: dict[str, dict[str, Any]], problems: list[str]) -> RunConfig:
    """What the runs of a row have in common; the run file's options of a method are that method's only."""
    with_r_drop = name.endswith(R_DROP)
    method = name.removesuffix(R_DROP).removesuffix("+") or "full"
    own = config.method.name.lower()
    own = own if own == "full" else method_named(own).name
    content = config.model_dump(exclude={"compare"})
    content["method"] = {"name": method, **(config.method.options if own == method else {})}
    alpha = (config.train.r_drop_alpha or R_DROP_ALPHA) if with_r_drop else 0.0
    content["train"].update(keep_best=False, early_stopping=None, r_drop_alpha=alpha)
    wrong = []
    for source in dict.fromkeys([method, name]):
        for key, value in settings.get(source, {}).items():
            part, _, rest = key.partition(".")
            if part not in ("method", "train") or not rest:
                wrong.append(f"{key}: is not method.KEY or train.KEY; the rest is the same for all methods")
            elif key in ("method.name", "train.seed", "train.keep_best", "train.early_stopping"):
                wrong.append(f"{key}: is not for a method to set; see `mindpet compare --help`")
            else:
                content[part][rest] = value
    try:
        common = RunConfig.model_validate(content)
        wrong += method_problems(common.method)
    except ValidationError as error:
        common = config
        wrong += [_in_words(entry) for entry in error.errors()]
    problems += [f"compare.settings.{name}: {words}" for words in wrong]
    return common if wrong else with_rate(common)
