"""P-Tuning: GPT Understands, Too. Liu et al. 2021, arXiv:2103.10385, section 3.2.

Virtual tokens before the words, as in prompt tuning, but their embeddings come out of a small network, through which
they depend on each other (LSTM) or at least on common weights (MLP). After training only what comes out is needed.

::

    E (tokens, hidden) ──┬── MLP ───────────────────────────┬── P (tokens, hidden)
                         └── LSTM in both directions ── MLP ┘
"""

from dataclasses import dataclass

from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, initializer

from mindpet import _checks
from mindpet.delta.method import DeltaConfig, Method
from mindpet.delta.prompt_slot import PromptSlot


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(DeltaConfig):
    """Virtual tokens before the words, out of a small network.

    Attributes:
        tokens: how many.
        encoder: ``"mlp"``, or ``"lstm"`` with a smaller MLP behind it, as in the paper.
        encoder_hidden: width of the encoder; None takes the network's hidden size.
        encoder_layers: of the LSTM.
        dropout: probability, between the layers of the LSTM, in training only.
    """

    tokens: int = 20
    encoder: str = "mlp"
    encoder_hidden: int | None = None
    encoder_layers: int = 2
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("tokens", "encoder_layers"):
            _checks.positive_int("PTuningConfig", name, getattr(self, name))
        if self.encoder_hidden is not None:
            _checks.positive_int("PTuningConfig", "encoder_hidden", self.encoder_hidden)
        if self.encoder not in ("mlp", "lstm"):
            raise ValueError(
                f"For 'PTuningConfig', 'encoder' must be 'mlp' or 'lstm', but got {_checks.shown(self.encoder)}."
            )
        _checks.rate("PTuningConfig", "dropout", self.dropout, allow_int=True)
        if self.dropout and (self.encoder == "mlp" or self.encoder_layers == 1):
            raise ValueError(
                "For 'PTuningConfig', 'dropout' is between the layers of an LSTM, so it needs encoder='lstm' and "
                f"'encoder_layers' of 2 or more, but got {self.encoder!r} and {self.encoder_layers}."
            )


class PTuning(PromptSlot):
    r"""A slot whose virtual tokens a small network makes.

    .. math:: P = \mathrm{relu}(\mathrm{relu}(E W_1^T + b_1) W_2^T + b_2) W_3^T + b_3
        \quad\text{or}\quad P = \mathrm{relu}(\mathrm{LSTM}(E) W_1^T + b_1) W_2^T + b_2

    Shapes: E and P ``(tokens, hidden)``; with e for `encoder_hidden`, the MLP goes from hidden to e to e to hidden, and
    behind an LSTM, whose output is ``(tokens, 2 e)``, from 2 e to 2 e to hidden. E starts with a deviation of 1 and
    everything else as MindSpore's (and torch's) layers do; tuning starts elsewhere than at the network, which did not
    see these tokens. Cost, with an MLP:
    ``tokens * hidden + e * (2 * hidden + e + 2) + hidden`` parameters, ``work(tokens + seq) - work(seq)``
    floating-point operations a text, with the network's own work on a text of so many tokens, and
    ``tokens * (2 * e * (2 * hidden + e) + 2 * e + hidden)`` a call. Cost, with an LSTM of L layers:
    ``tokens * hidden + 8 * e * (hidden + e + 2 + (L - 1) * (3 * e + 2)) + 2 * e * (2 * e + 1) + hidden * (2 * e + 1)``
    parameters, ``work(tokens + seq) - work(seq)`` floating-point operations a text and, but for what is done with the
    gates of the LSTM,
    ``tokens * (16 * e * (hidden + e + (L - 1) * 3 * e) + (2 * e + hidden) * (4 * e + 1)) + 8 * e * L`` a call.

    >>> PTuning(nn.Embedding(11, 8), PTuningConfig(tokens=3, encoder_hidden=4))().shape
    (3, 8)
    """

    delta_method = "p_tuning"

    def __init__(self, words: nn.Embedding, config: PTuningConfig):
        super().__init__(words)
        self.tokens, self.encoder = config.tokens, config.encoder
        hidden, inner = self.hidden_size, config.encoder_hidden or self.hidden_size
        self.encoder_hidden, self.encoder_layers, self.encoder_dropout = inner, config.encoder_layers, config.dropout
        self.mindpet_delta_p_tuning_embedding = Parameter(
            initializer(Normal(1.0), (config.tokens, hidden)), name="mindpet_delta_p_tuning_embedding"
        )
        if config.encoder == "lstm":
            self.mindpet_delta_p_tuning_lstm = nn.LSTM(
                hidden, inner, config.encoder_layers, dropout=float(config.dropout), bidirectional=True
            )
            layers = [nn.Dense(2 * inner, 2 * inner), nn.ReLU(), nn.Dense(2 * inner, hidden)]
        else:
            layers = [nn.Dense(hidden, inner), nn.ReLU(), nn.Dense(inner, inner), nn.ReLU(), nn.Dense(inner, hidden)]
        self.mindpet_delta_p_tuning_mlp = nn.SequentialCell(layers)

    @classmethod
    def from_slot(cls, slot: PromptSlot, config: PTuningConfig) -> "PTuning":
        """The slot, filled."""
        return cls(slot.words, config)

    def construct(self):
        rows = self.mindpet_delta_p_tuning_embedding  # (tokens, hidden)
        if self.encoder == "lstm":
            rows, _ = self.mindpet_delta_p_tuning_lstm(rows.expand_dims(1))  # (tokens, 1, 2 e)
            rows = rows.reshape((self.tokens, -1))  # (tokens, 2 e)
        return self.mindpet_delta_p_tuning_mlp(rows)  # (tokens, hidden)


METHOD = Method(
    name="p_tuning",
    config=PTuningConfig,
    trainable=("*mindpet_delta_p_tuning*",),
    paper="Liu et al. 2021, GPT Understands, Too, arXiv:2103.10385",
    adapt={PromptSlot: PTuning.from_slot},
    targets=("*prompts",),
    learning_rate=0.001,
)
