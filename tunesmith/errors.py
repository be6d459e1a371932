"""The tree of errors a user can meet.

Every message says what is wrong, where (file:line or config key), what was expected and how to mend it.
The command line prints the message alone; the traceback is for `--debug`. An `assert` is for our own
mistakes only.

    TunesmithError                 exit code 1: the run failed
      UserError                    exit code 2: what the user gave is wrong
        ConfigError                the config file or an override
        DataError                  a data file or a row in it
        TemplateError              the chat template cannot do what is asked of it
        ModelError                 the model or adapter cannot be loaded or adapted as asked
        MissingExtraError          an optional package is not installed
      ExportError                  what was exported is not what was trained, or cannot be checked
      CheckpointError              a checkpoint is damaged or does not belong to this run
      MergeError                   a merged model does not predict what its adapter does
      TrainingError                training cannot go on (a loss that is not finite)
      RankError                    one of several processes has failed, is late or has gone
      Interrupted                  SIGINT or SIGTERM ended the run after a save: exit code 130 or 143
"""

from __future__ import annotations


class TunesmithError(Exception):
    """Base of every error that tunesmith raises on purpose."""

    exit_code = 1


class UserError(TunesmithError):
    """What the user gave is wrong; nothing was trained."""

    exit_code = 2


class ConfigError(UserError):
    """A config file, an override or a combination of settings is wrong."""


class DataError(UserError):
    """A data file cannot be read, or a row in it cannot be trained on."""


class TemplateError(UserError):
    """The chat template is missing, broken, or renders something that cannot be masked exactly."""


class ModelError(UserError):
    """The model, tokenizer or adapter cannot be loaded or adapted as asked."""


class MissingExtraError(UserError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the package {package!r}. Install it: pip install 'tunesmith[{extra}]'"
        )


class ExportError(TunesmithError):
    """What was exported differs from what was trained, or the tools to write or check it are not there."""


class CheckpointError(TunesmithError):
    """A checkpoint is damaged, or belongs to another run."""


class MergeError(TunesmithError):
    """A merged model does not predict what its adapter does; it was not kept."""


class TrainingError(TunesmithError):
    """Training cannot go on."""


class RankError(TunesmithError):
    """One of the processes of a run has failed, is late or has gone; `exit_code` may be its own."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(TunesmithError):
    """A signal ended the run; `exit_code` is 128 + the signal's number, as shells have it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
