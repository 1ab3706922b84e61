# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Bridges between the versions of JAX that this project runs on, 0.11.2 and 0.12.

Everything that is private there, or differs between the two, is reached through here.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

H100 = "NVIDIA H100 80GB HBM3"
"""The device that kernels are lowered for where there is none."""


def mosaic_interpret(interpret: bool, *, detect_races: bool = True) -> dict[str, Any]:
    """Make the argument that sends a Mosaic kernel through the interpreter; nothing if it runs.

    Args:
        interpret: whether to interpret it.
        detect_races: whether a race between threads is an error.
    """
    if not interpret:
        return {}
    return {"interpret": plgpu.InterpretGPUParams(detect_races=detect_races)}


def reset_interpreter() -> None:
    """Make Mosaic's interpreter forget its memory, as it must after an error in a kernel."""
    interpreter = sys.modules.get("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    if interpreter is not None:  # nothing was interpreted yet
        interpreter.reset_gpu_interpret_mode_state()


def lowered(f: Callable[..., Any], *shapes: Any, device_kind: str = H100) -> jax.stages.Lowered:
    """Lower `f` for CUDA without a GPU: layouts and transforms are checked, nothing runs.

    Args:
        f: a function of arrays.
        *shapes: `jax.ShapeDtypeStruct`s, or pytrees of them.
        device_kind: the GPU to lower for.
    """
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("gpu",), abstract_device=device)):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))
