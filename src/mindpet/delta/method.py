"""What a tuning method is: a record that everything else reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from inspect import signature
from typing import TYPE_CHECKING, Any

from mindspore import nn

from mindpet import _checks

if TYPE_CHECKING:
    from typing_extensions import Self

# where low-rank deltas usually go: queries and values, in BERT, LLaMA and GPT-2
ATTENTION = ("*.query", "*.value", "*.q_proj", "*.v_proj", "*.c_attn")
# the last dense layer of the feed-forward network in BERT, LLaMA and GPT-2: its input is the hidden activation
FEEDFORWARD = ("*[0-9].output.dense", "*.mlp.down_proj", "*.mlp.c_proj")
# where adapters usually go: behind attention and behind the feed-forward network, in BERT, LLaMA and GPT-2
AFTER_BLOCKS = (
    "*.attention.output.dense",
    "*.layer.*.output.dense",
    "*.self_attn.o_proj",
    "*.mlp.down_proj",
    "*.attn.c_proj",
    "*.mlp.c_proj",
)


_AXES = ("butterfly_factors", "encoder_hidden", "frequencies", "initial_rank", "num_tasks", "rank", "size", "tokens")
_HARMLESS = 1024  # an axis that takes little memory, whatever the file says


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """What every method's configuration has.

    Attributes:
        targets: patterns (``fnmatch``) on the paths of the cells to adapt, or ``"all-linear"``; None takes the
            method's usual ones for the networks in `mindpet.models`. An entry may be a type of Cell instead. Of a
            method that only selects parameters: the cells whose own parameters it may select; None takes all.
        exclude: patterns on the paths of cells to leave alone although `targets` matches them.
        layers: numbers of the layers to adapt (the first number in a path), or None for all.
        modules_to_save: cells, a new head for instance, that are trained and saved whole: patterns on their paths or
            on the ends of their paths.
    """

    targets: Sequence[str | type] | str | None = None
    exclude: Sequence[str] = ()
    layers: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()

    def __new__(cls, *unnamed: Any, **options: Any) -> "Self":
        taken = signature(cls.__init__).parameters
        known = [name for name in taken if name != "self"]
        if any(each.kind is each.VAR_KEYWORD for each in taken.values()):
            return super().__new__(cls)
        wrong = [f"{name!r}{_checks.near(name, known)}" for name in options if name not in known]
        if wrong:
            raise TypeError(f"{cls.__name__} has no option {', '.join(wrong)}; its options are {', '.join(known)}.")
        return super().__new__(cls)

    def __post_init__(self):
        owner = type(self).__name__
        for name in ("exclude", "modules_to_save"):
            object.__setattr__(self, name, patterns_of(owner, name, getattr(self, name)))
        if self.targets is not None and self.targets != "all-linear":
            object.__setattr__(self, "targets", patterns_of(owner, "targets", self.targets, (str, type)))
            if not self.targets:
                raise ValueError(
                    f"For '{owner}', 'targets' must name a cell at least, but got an empty list: leave it out for the "
                    "method's usual ones."
                )
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
            wrong = [layer for layer in layers if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0]
            if wrong:
                raise ValueError(
                    f"For '{owner}', 'layers' must be numbers from 0 on, but got {_checks.shown(wrong[0])}."
                )
            object.__setattr__(self, "layers", layers)

    def at(self, path: str) -> "Self":
        """What holds for the cell at `path`; methods with patterns of their own override this."""
        return self

    def patterns(self) -> dict[str, str]:
        """Further patterns on the paths of adapted cells, each of which must match one, to the option that has it."""
        return {}

    def narrowed(self, matched: dict[str, nn.Cell]) -> dict[str, nn.Cell]:
        """Those of the targeted cells, by path, that are adapted: all, but for methods that choose among them."""
        return matched

    def axes(self) -> dict[str, int]:
        """Options that are lengths of axes of what is saved: a file without so long an axis was not made with them."""
        return {name: value for name in _AXES if type(value := getattr(self, name, None)) is int}

    def stored(self) -> "Self":
        """What a saved delta keeps of it; methods that read other files to begin with leave those out."""
        return self


@dataclass(frozen=True, kw_only=True)
class RankedConfig(DeltaConfig):
    """What the methods have whose delta has a rank and is scaled by alpha over it.

    Attributes:
        rank: r.
        alpha: the delta is scaled by alpha / rank.
        rank_pattern: path patterns to another rank; the first that matches counts.
        alpha_pattern: path patterns to another alpha.
    """

    rank: int = 8
    alpha: float = 16.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        for name in ("rank_pattern", "alpha_pattern"):
            _checks.table(owner, name, getattr(self, name))
        _checks.positive_int(owner, "rank", self.rank)
        _checks.non_zero_number(owner, "alpha", self.alpha)
        for pattern, rank in self.rank_pattern.items():
            _checks.positive_int(owner, f"rank_pattern[{pattern}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _checks.non_zero_number(owner, f"alpha_pattern[{pattern}]", alpha)

    def at(self, path: str) -> "Self":
        """With the rank and the alpha of the cell at `path`."""
        rank = next((rank for pattern, rank in self.rank_pattern.items() if fnmatchcase(path, pattern)), self.rank)
        alpha = next((alpha for pattern, alpha in self.alpha_pattern.items() if fnmatchcase(path, pattern)), self.alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def axes(self) -> dict[str, int]:
        """The longest of the ranks, besides."""
        return {**super().axes(), "rank": max((self.rank, *self.rank_pattern.values()))}

    def patterns(self) -> dict[str, str]:
        """The patterns of ranks and alphas."""
        return dict.fromkeys(self.alpha_pattern, "alpha_pattern") | dict.fromkeys(self.rank_pattern, "rank_pattern")


def too_long(config: DeltaConfig, tensors: Mapping[str, Any]) -> list[str]:
    """The options for which no tensor of a file has an axis long enough, before memory is taken for them, in words."""
    longest = max((length for value in tensors.values() for length in value.shape), default=0)
    enough = max(longest, _HARMLESS)
    return [
        f"{name} is {_checks.shown(length)}, and no tensor in the file has an axis longer than {longest}"
        for name, length in config.axes().items()
        if length > enough
    ]


def patterns_of(owner: str, name: str, value: Any, kinds: tuple = (str,)) -> tuple:
    """One pattern, or a sequence of them, as a tuple."""
    entries = (value,) if isinstance(value, kinds) else value
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, kinds) for entry in entries):
        raise TypeError(f"For '{owner}', '{name}' must be a pattern or a list of them, but got {_checks.shown(value)}.")
    return tuple(entries)


def same_configuration(here: Any, there: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a delta made with the configuration `there`, for a network injected with `here`: as they are.

    Raises:
        ValueError: the two compute differently.
    """
    here, there = here.stored(), there.stored()
    harmless = ("targets", "exclude", "layers", "top_layers", "modules_to_save", "dropout", "start")
    differ = [
        f"{entry.name} was {getattr(there, entry.name)!r} and is {getattr(here, entry.name)!r} here"
        for entry in fields(here)
        if entry.name not in harmless and getattr(here, entry.name) != getattr(there, entry.name)
    ]
    if differ:
        raise ValueError("the delta was made with another configuration: " + ", ".join(differ))
    return tensors


@dataclass(frozen=True)
class PeftNames:
    """How Hugging Face PEFT writes a method's directory.

    Attributes:
        kind: its ``peft_type``.
        tensors: name of each tensor, after the path of the module, to the parameter's name in the adapted Cell. A Cell
            need not have all of them. Axes of size 1 may be more or fewer there.
        options: key of ``adapter_config.json`` to the attribute of the configuration here.
        fixed: key to the only value that computes what is computed here. It is written; another one is refused.
        alike: key of `fixed` to further values that compute the same.
        free: keys that are of no importance to a trained adapter: how it is started, trained, saved.
        turned: those of the tensors that are transposed there.
        shared: names of tensors that all modules share, without a path before them, to the parameter's name here.
        modules: key that lists modules, or ends of their paths, to the attribute of the configuration here: patterns,
            which at the path of one that it does not mean are none.
        topmost: key that says in how many modules it is: the last ones of those that it could be in.
        selected: for a method that only selects parameters: what there stands between the path of a module that it
            trains and the names of the module's own tensors.
        lacks: keys of other methods that this one's configuration does not have there.
        unpack: for tensors that are stored in another shape there: ``unpack(content, tensors)`` gives them as they are
            here, by the same names.
        pack: the reverse, ``pack(content, tensors)``, which also puts into the configuration what reading takes.
    """

    kind: str
    tensors: Mapping[str, str]
    options: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    alike: Mapping[str, tuple] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    topmost: str = ""
    selected: str = ""
    lacks: tuple[str, ...] = ()
    unpack: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    pack: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Method:
    """One tuning method.

    Attributes:
        name: how the user calls it.
        config: the class of its configuration.
        trainable: patterns on parameter paths, what it trains.
        paper: author, year, title, where.
        adapt: for each type of Cell that it adapts, what makes the adapted Cell: ``make(cell, config)``. Empty when
            it only selects parameters.
        share: what all adapted cells of an injection have in common: ``share(cells, config)``. Then each is made by
            ``make(cell, config, shared)``.
        linear: those of the types that ``"all-linear"`` means.
        targets: the usual targets in the networks of `mindpet.models`.
        learning_rate: a sensible one to begin with, for Adam.
        aliases: other names that it is known by.
        norm_trainable: attributes of LayerNorm that it trains too, when asked to include norms.
        fit: turns the tensors of a delta made with another configuration of the method into those for this one:
            ``fit(here, there, tensors)``. What it cannot turn, it leaves, and loading reports it.
        rate: factor of the learning rate of a parameter: ``rate(config, name)``. None where it is 1 for all.
        optimizer: puts an optimizer of its own around another: ``optimizer(other, cells, config, steps)``, with the
            adapted cells by path and the number of steps to come. None where any will do.
        peft: how PEFT writes it, if PEFT has it and the layout is a tensor for a parameter. (LoRA and the prefix
            methods have readers of their own in `mindpet.interop`.)
    """

    name: str
    config: type[DeltaConfig]
    trainable: tuple[str, ...]
    paper: str
    adapt: Mapping[type[nn.Cell], Callable[..., nn.Cell]] = field(default_factory=dict)
    share: Callable[[list[Any], Any], Any] | None = None
    linear: tuple[type[nn.Cell], ...] = (nn.Dense,)
    targets: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    aliases: tuple[str, ...] = ()
    norm_trainable: tuple[str, ...] = ()
    fit: Callable[[Any, Any, dict[str, Any]], dict[str, Any]] = same_configuration
    rate: Callable[[Any, str], float] | None = None
    optimizer: Callable[[nn.Optimizer, Mapping[str, Any], Any, int], nn.Optimizer] | None = None
    peft: PeftNames | None = None
