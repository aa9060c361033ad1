"""The errors that a user may see, each with the exit code that it means."""

from __future__ import annotations

from gaudi_batch.redaction import redact


class GaudiBatchError(Exception):
    """Any end of a command that has a sentence for the user; `exit_code` is what the command returns. The sentence has
    no secrets, whoever writes it."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class InputError(GaudiBatchError):
    """The job can't be run as it was given: bad usage, bad input, or an output that belongs to another job."""

    exit_code = 2


class HubUnreachable(InputError):
    """The model hub can't be reached, and what is asked of it is not in the cache."""


class StorageError(GaudiBatchError):
    """Storage refused, or went on failing for longer than the job's patience."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        """Whether trying again would be of no use: no permission, no space, no such place."""


class RunStopped(GaudiBatchError):
    """The run ended before every image was made; the same command resumes it."""


class Interrupted(RunStopped):
    """Ctrl-C or SIGTERM ended the run."""

    exit_code = 130


class ForcedInterrupt(Interrupted):
    """A second one did, which waits for nothing."""
