"""Write docs/run-file.md: every key of a run file, from the sections in src/mindpet/train/config.py.

    python scripts/run_file_reference.py

A test compares the page with what this makes, so a key cannot be added without it.
"""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from mindpet._methods import MODULES
from mindpet.train.config import RunConfig, as_yaml

PAGE = Path(__file__).parent.parent / "docs" / "run-file.md"

HEAD = """\
# The run file

Every key that a run file may have. `mindpet config init run.yaml` writes a file with all of them;
`mindpet config validate run.yaml` checks one, with the model and the data that it names; `mindpet config show run.yaml`
prints it with all defaults filled in. [Write a run file](how-to/run-file.md) goes through one step by step.

A file is YAML with the sections below. Only `model.path` and `data.train` must be there. A key that is left out or left
empty has its default. An unknown key is an error that names near ones. All problems are told at once. On
the command line `section.key=value` goes over the file: `mindpet finetune run.yaml train.epochs=3`. Paths are relative
to the directory in which the command runs.
"""

METHODS = """\
The further keys of this section are the options of the method, each on the method's page and in `mindpet methods NAME`:
{links}. `full` trains all parameters and has no options.

All methods but `full` have these:

| key | type | default | meaning |
|---|---|---|---|
| `targets` | list of text, or `all-linear` | the method's own | patterns on the paths of the cells to adapt |
| `exclude` | list of text | `[]` | patterns on the paths of cells to leave alone although `targets` matches them |
| `layers` | list of int | all | numbers of the layers to adapt, from 0 on: the first number in a path |
| `modules_to_save` | list of text | `[]` | cells that train and are saved whole; a classifier's head does anyhow |

An override of `method.name` leaves nothing of the file's section `method`: its options are not the new method's.
"""

LEAST = """\
## The least

```yaml
model:
  path: models/minilm
data:
  train: headlines.jsonl
```

With all defaults filled in this is:

```yaml
{whole}```
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        about = " ".join((section.__doc__ or "").split())
        parts.append(f"## `{name}`\n\n{about}\n")
        rows = "".join(_row(key, entry) for key, entry in section.model_fields.items())
        parts.append(f"| key | type | default | meaning |\n|---|---|---|---|\n{rows}")
        if name == "method":
            links = ",\n".join(f"[`{one}`](methods/{one}.md)" for one in MODULES)
            parts.append(METHODS.format(links=links))
    least = RunConfig.model_validate({"model": {"path": "models/minilm"}, "data": {"train": "headlines.jsonl"}})
    parts.append(LEAST.format(whole=as_yaml(least)))
    return "\n".join(parts)


def _row(key: str, field: FieldInfo) -> str:
    kind = _kind(field.annotation) + _limits(field.metadata)
    meaning = (field.description or "").replace("|", "\\|")
    if (key, field.default) == ("name", "lora"):  # they follow, each with a link
        meaning = "one of those below, or `full`"
    return f"| `{key}` | {kind} | {_default(field)} | {meaning} |\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    if field.default is None:
        return "empty"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _kind(annotation: Any) -> str:
    """A type in words: `int`, `text`, one of some words, a list of these."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0]) + _limits(field.metadata if isinstance(field := inner[1], FieldInfo) else ())
    if origin is Literal:
        words = [f"`{word}`" for word in inner]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin in (Union, UnionType):
        return " or ".join(_kind(one) for one in inner if one is not type(None))
    if origin is list:
        return "list of " + _kind(inner[0]).replace("number", "numbers")
    if origin is dict:
        return "mapping of a method to its `section.key: value`"
    return {str: "text", bool: "`true` or `false`", int: "int", float: "number"}[annotation]


def _limits(metadata: Any) -> str:
    words = {
        Ge: lambda one: f"from {one.ge}",
        Gt: lambda one: f"above {one.gt}",
        Le: lambda one: f"to {one.le}",
        Lt: lambda one: f"below {one.lt}",
        MinLen: lambda one: f"at least {one.min_length}",
    }
    found = [words[type(one)](one) for one in metadata if type(one) in words]
    return f", {' '.join(found)}" if found else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
