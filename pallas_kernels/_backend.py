# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: a name is a promise, a refusal has a reason."""

import functools
import warnings
from collections.abc import Callable, Sequence

import jax

REFERENCE = "reference"
"""The implementation in plain JAX that every op has."""


@functools.cache
def gpu_kind() -> str | None:
    """Name the GPU that JAX computes on by default; `None` if there is none."""
    if jax.default_backend() != "gpu":
        return None
    return jax.devices()[0].device_kind


@functools.cache
def hopper_reason() -> str | None:
    """Say why kernels for Hopper cannot run here; `None` if they can."""
    if gpu_kind() is None:
        return f"needs an NVIDIA GPU, but JAX computes on {jax.default_backend()!r}"
    capability = float(getattr(jax.devices()[0], "compute_capability", "0.0"))
    if capability != 9.0:
        return f"needs compute capability 9.0 (Hopper), but {gpu_kind()} has {capability}"
    return None


@functools.cache
def triton_reason() -> str | None:
    """Say why Triton kernels cannot run here; `None` if they can."""
    if gpu_kind() is None:
        return f"needs an NVIDIA GPU, but JAX computes on {jax.default_backend()!r}"
    capability = float(getattr(jax.devices()[0], "compute_capability", "0.0"))
    if capability < 8.0:
        return f"needs compute capability 8.0 or newer, but {gpu_kind()} has {capability}"
    return None


def resolve(
    op: str,
    implementation: str | Sequence[str] | None,
    preferred: Sequence[str],
    unsupported_reason: Callable[[str], str | None],
) -> str:
    """Settle which implementation of `op` runs.

    A name gets that one or an error. `None` takes the first preferred kernel without objection;
    the reference where there is no GPU, and with a warning where a GPU refuses all kernels. A
    sequence gives its first without objection, with a warning for each refusal.

    Args:
        op: for messages.
        implementation: what the caller asked for.
        preferred: the kernels of the op, the fastest first; the reference is not among them.
        unsupported_reason: says why a kernel cannot take these arguments, `None` if it can.

    Raises:
        ValueError: a name is unknown.
        NotImplementedError: the named kernel cannot be used; the message says why.
        ExceptionGroup: none of a sequence can be used.

    Example:
        >>> resolve("f", ("triton", "reference"), ("triton",), lambda name: None)
        'triton'
        >>> resolve("f", "reference", ("triton",), lambda name: None)
        'reference'
    """
    known = (*preferred, REFERENCE)
    if isinstance(implementation, str):
        _check_name(op, implementation, known)
        reason = None if implementation == REFERENCE else unsupported_reason(implementation)
        if reason is not None:
            raise NotImplementedError(f"{op}: implementation={implementation!r} {reason}")
        return implementation
    if implementation is None:
        if gpu_kind() is None:
            return REFERENCE
        names: Sequence[str] = known
    else:
        names = implementation
    refusals = []
    for name in names:
        _check_name(op, name, known)
        reason = None if name == REFERENCE else unsupported_reason(name)
        if reason is None:
            break
        refusals.append(NotImplementedError(f"{op}: implementation={name!r} {reason}"))
    else:
        raise ExceptionGroup(f"{op}: none of {tuple(names)} can be used", refusals)
    if implementation is not None or name == REFERENCE:
        for refusal in refusals:
            warnings.warn(f"{refusal}; {name!r} runs instead", stacklevel=3)
    return name


def _check_name(op: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{op}: unknown implementation={name!r}; known: {', '.join(known)}")
