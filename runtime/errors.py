"""The exceptions a user can meet. Every one prints as a single line and ends a command with exit code 2.

    PocketError
    |-- BundleError     a bundle is damaged, incomplete or needs an operation this runtime does not know
    |-- CheckpointError a directory is no checkpoint, or one that cannot be handled
    |-- DeviceError     a device cannot be reached or used (evals/remote/remote_ssh.py)
    |-- InputError      an image, question or option cannot be used
    |   `-- SampleError     one sample of a data set (distill/inputs/data.py)
    |-- MissingExtra    an optional dependency is not installed
    |-- ParityError     an exported part does not reproduce the checkpoint
    |-- ServerError     a generation server stays broken or serves the wrong weights (evals/client.py)
    |-- StateError      an output directory holds something else than the command expects
    `-- TrainingError   training cannot go on

A message says where, what it got, what it wanted and what to do next.
"""

from __future__ import annotations


class PocketError(Exception):
    """Base of every error that a user can act on."""


class BundleError(PocketError):
    """A bundle is damaged, incomplete, or needs an operation that this runtime does not know."""


class CheckpointError(PocketError):
    """A directory is no Hugging Face checkpoint, or one that cannot be handled."""


class InputError(PocketError):
    """An image, a question or an option cannot be used."""


class ParityError(PocketError):
    """An exported part does not reproduce the checkpoint it was made from."""


class StateError(PocketError):
    """An output directory holds something else than the command expects."""


class TrainingError(PocketError):
    """Training cannot go on."""


class MissingExtra(PocketError):
    """An optional dependency is not installed; the message names the pip command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'pocketvlm[{extra}]'")
        self.package = package
        self.extra = extra
