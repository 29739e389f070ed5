"""Checkpoints that hold the trainable parameters and nothing else."""

import os
from collections.abc import Iterator
from typing import Any

from mindspore import Parameter, nn, save_checkpoint
from mindspore.train import CheckpointConfig, ModelCheckpoint, RunContext

from mindpet import _checks, _compat
from mindpet.graph.inject import MARKER
from mindpet.utils.exceptions import AbsolutePathError, LinkPathError


class TrainableParamsCheckPoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` whose files hold only what trains: no frozen weight, no moment, no learning rate.

    Give it to ``Model.train(callbacks=...)``. Load the base checkpoint first and this one on top, both with
    ``mindspore.load_checkpoint`` and ``load_param_into_net``. A file appears whole or not at all, and an older one is
    removed only after the newer one is there.

    Args:
        directory: absolute path of the directory to save in, made if it is missing.
        prefix: how the names of the files begin.
        config: every option of ``CheckpointConfig`` is honoured.

    Raises:
        TypeError: `config` is not a CheckpointConfig, `directory` is not a str.
        ValueError: `directory` is None or empty; `prefix` is not a str without ``/``.
        LinkPathError: `directory` is a symbolic link.
        AbsolutePathError: `directory` is not absolute.
    """

    def __init__(self, directory: str, prefix: str = "DELTA_CKP", config: CheckpointConfig | None = None):
        owner = type(self).__name__
        if directory is None or directory == "":
            raise ValueError(
                f"For '{owner}', 'directory' must be an absolute path, but got {_checks.shown(directory)}."
            )
        _checks.string(owner, "directory", directory)
        if config is not None and not isinstance(config, CheckpointConfig):
            raise TypeError(f"For '{owner}', 'config' must be a CheckpointConfig, but got {_checks.shown(config)}.")
        if os.path.islink(os.path.normpath(directory)):
            raise LinkPathError(f"For '{owner}', 'directory' must not be a symbolic link, but {directory} is one.")
        if not os.path.isabs(directory):
            raise AbsolutePathError(f"For '{owner}', 'directory' must be absolute, but got {directory!r}.")
        config = config or CheckpointConfig()
        super().__init__(prefix=prefix, directory=directory, config=config)
        self._delta = _TrainablePart(config.saved_network)
        self._config = _compat.with_saved_network(config, self._delta)
        # On an exception Model itself would save the whole network, moments included: __exit__ does it instead.
        self._exception_save, self._config.exception_save = config.exception_save, False
        self._progress: Any = None
        self._manager = _RemoveAfterwards(config.format)

    def begin(self, run_context: RunContext) -> None:
        """Take the training network for what is saved."""
        self._progress = run_context.original_args()
        self._delta.follow(self._progress.train_network)

    def step_end(self, run_context: RunContext) -> None:
        """Save, when it is time to."""
        super().step_end(run_context)
        if not self._config.async_save:
            self._manager.remove_now()

    def end(self, run_context: RunContext) -> None:
        """Save the last state, wait for what is still being written, and tidy up."""
        super().end(run_context)
        self._manager.remove_now()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """With ``exception_save``: save what training has come to, under MindSpore's name for it."""
        if kind is None or not self._exception_save or self._progress is None:
            return
        epoch, step, steps = self._progress.cur_epoch_num, self._progress.cur_step_num, self._progress.batch_num
        prefix = _compat.breakpoint_prefix(self._directory, self._exception_prefix)
        name = f"{prefix}-{epoch}_{(step - 1) % steps + 1 if step else 0}_breakpoint.ckpt"
        self._append_dict_content(epoch, step)
        save_checkpoint(
            self._delta,
            os.path.join(self._directory, name),
            self._config.integrated_save,
            append_dict=self._append_dict,
            enc_key=self._config.enc_key,
            enc_mode=self._config.enc_mode,
            crc_check=self._config.crc_check,
        )


class _TrainablePart(nn.Cell):
    """What `ModelCheckpoint` is told to save: a Cell that shows only the trainable parameters of a network."""

    def __init__(self, saved_network: nn.Cell | None):
        super().__init__(auto_prefix=False)
        self._holder: dict[str, Any] = {"saved": saved_network, "training": None}  # a Cell in a dict is no child

    def follow(self, network: nn.Cell) -> None:
        """Take `network`, with loss and optimizer around it, as what trains."""
        self._holder["training"] = network

    @property
    def parameter_layout_dict(self) -> dict:
        """How parameters are cut over devices."""
        return self._holder["training"].parameter_layout_dict

    @parameter_layout_dict.setter
    def parameter_layout_dict(self, value: dict) -> None:
        pass  # Cell.__init__ sets it; the training network's is what counts

    def parameters_and_names(self, name_prefix: str = "", expand: bool = True) -> Iterator[tuple[str, Parameter]]:
        """What trains, and what a method added that does not, such as random parts, which are in no base.

        What belongs to the optimizer itself is left out.
        """
        network = self._holder["saved"] or self._holder["training"]
        own = set()
        for _, cell in network.cells_and_names():
            if isinstance(cell, nn.Optimizer):
                trained = {id(parameter) for parameter in cell.parameters}
                own |= {id(parameter) for parameter in cell.get_parameters() if id(parameter) not in trained}
        for name, parameter in network.parameters_and_names(name_prefix, expand):
            if (parameter.requires_grad or MARKER in name) and id(parameter) not in own:
                yield name, parameter


class _RemoveAfterwards(_compat.CheckpointManager):
    """Holds back the removal of old files until the new one is written: a kill in between costs nothing."""

    def __init__(self, file_format: str):
        super().__init__(file_format)
        self._removable: list[str] = []

    def update_ckpoint_filelist(self, directory: str, prefix: str) -> None:
        """The files that count: those already given up do not."""
        self.remove_now()
        super().update_ckpoint_filelist(directory, prefix)

    def remove_ckpoint_file(self, file_name: str) -> None:
        """Remember it for :meth:`remove_now`."""
        self._removable.append(file_name)

    def remove_now(self) -> None:
        """Remove what was remembered."""
        for file_name in self._removable:
            super().remove_ckpoint_file(file_name)
        self._removable = []
