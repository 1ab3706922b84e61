# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The bridges between JAX versions: the interpreter, its reset, lowering without a GPU."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as plt

from pallas_kernels import _compat

SHAPE = jax.ShapeDtypeStruct((4, 128), jnp.float32)
INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"


def doubled_by_mosaic(x, *, interpret=False, wrong_row=0):
    def body(x_ref, out_ref, staging, arrived):
        row = lax.axis_index("row")
        plgpu.copy_gmem_to_smem(x_ref.at[row], staging, arrived)
        plgpu.barrier_wait(arrived)
        staging[...] = 2.0 * staging[...] + 0.0 * x_ref[row + wrong_row, 0]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out_ref.at[row])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=SHAPE,
        scratch_types=(plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()),
        grid=(4,),
        grid_names=("row",),
        **_compat.mosaic_interpret(interpret),
    )(x)


def doubled_by_triton(x, *, interpret=False):
    def body(x_ref, out_ref):
        out_ref[...] = 2.0 * x_ref[...]

    return pl.pallas_call(
        body,
        out_shape=SHAPE,
        grid=(4,),
        in_specs=[pl.BlockSpec((1, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((1, 128), lambda i: (i, 0)),
        compiler_params=plt.CompilerParams(num_warps=4),
        interpret=interpret,
    )(x)


def numbers():
    return jnp.arange(4 * 128, dtype=jnp.float32).reshape(4, 128)


def test_a_kernel_that_runs_gets_no_argument():
    assert _compat.mosaic_interpret(False) == {}


@pytest.mark.parametrize("detects", [True, False])
def test_a_kernel_that_is_interpreted_gets_its_parameters(detects):
    (parameters,) = _compat.mosaic_interpret(True, detect_races=detects).values()
    assert isinstance(parameters, plgpu.InterpretGPUParams)
    assert parameters.detect_races is detects


def test_races_are_errors_unless_said_otherwise():
    assert _compat.mosaic_interpret(True)["interpret"].detect_races is True


def test_both_backends_are_interpreted():
    want = 2.0 * np.asarray(numbers())
    np.testing.assert_array_equal(doubled_by_mosaic(numbers(), interpret=True), want)
    np.testing.assert_array_equal(doubled_by_triton(numbers(), interpret=True), want)


def test_after_an_error_in_a_kernel_and_a_reset_the_next_one_runs():
    with pytest.raises(Exception, match=r"(?i)out.of.bounds|index|range"):
        jax.block_until_ready(doubled_by_mosaic(numbers(), interpret=True, wrong_row=9))
    _compat.reset_interpreter()
    found = doubled_by_mosaic(numbers(), interpret=True)
    np.testing.assert_array_equal(found, 2.0 * np.asarray(numbers()))


def test_a_reset_calls_the_interpreter_that_was_loaded(monkeypatch):
    doubled_by_mosaic(numbers(), interpret=True)
    called = []
    monkeypatch.setattr(
        sys.modules[INTERPRETER], "reset_gpu_interpret_mode_state", lambda: called.append(1)
    )
    _compat.reset_interpreter()
    assert called == [1]


def test_a_reset_before_anything_was_interpreted_does_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, INTERPRETER, raising=False)
    _compat.reset_interpreter()
    assert INTERPRETER not in sys.modules


@pytest.mark.parametrize(
    ("kernel", "target"),
    [(doubled_by_mosaic, "mosaic_gpu"), (doubled_by_triton, "triton")],
    ids=["mosaic_gpu", "triton"],
)
def test_both_backends_are_lowered_for_cuda_without_a_gpu(kernel, target):
    assert jax.default_backend() == "cpu"
    text = _compat.lowered(kernel, SHAPE).as_text()
    assert target in text


def test_the_device_that_is_lowered_for_can_be_named():
    seen = []

    def f(x):
        seen.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x

    _compat.lowered(f, SHAPE)
    _compat.lowered(f, SHAPE, device_kind="NVIDIA A100-SXM4-40GB")
    assert seen == [_compat.H100, "NVIDIA A100-SXM4-40GB"]


def test_trees_of_shapes_are_lowered_too():
    lowered = _compat.lowered(lambda tree, y: tree["x"] + y, {"x": SHAPE}, SHAPE)
    assert "tensor<4x128xf32>" in lowered.as_text()


def test_a_kernel_that_does_not_fit_its_device_is_refused():
    def body(x_ref, out_ref, staging):
        staging[0] = x_ref[0]
        out_ref[0] = staging[0]

    def greedy(x):
        large = plgpu.SMEM((1 << 16, 128), jnp.float32)
        return plgpu.kernel(body, out_type=SHAPE, scratch_types=(large,))(x)

    with pytest.raises(Exception, match=r"(?i)smem|shared memory"):
        _compat.lowered(greedy, SHAPE)
