# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One family of errors, so that a caller can tell what went wrong from what was asked wrongly.

A wrong argument is a `ValueError`, a backend that cannot is a `NotImplementedError`. What the
outside world does to us (too little memory, a broken file, a missing driver, an unusable text) is a
`SpardaError` of one of four kinds. Every message shows both numbers and the way out.
"""


class SpardaError(Exception):
    """Base of all errors that are not the caller's arguments."""


class CapacityError(SpardaError, ValueError):
    """A request is longer or larger than what was reserved for it."""


class CheckpointError(SpardaError, ValueError):
    """A checkpoint is missing, truncated, foreign, or made for another model."""


class BackendError(SpardaError, RuntimeError):
    """The device, the driver or the host memory cannot do what was asked for."""


class DataError(SpardaError, ValueError):
    """A text, a token file or a prompt cannot be used."""
