# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: a name is a promise, a refusal has a reason."""

import types
import warnings

import jax
import pytest

from pallas_kernels import _backend
from pallas_kernels._backend import resolve

KERNELS = ("mosaic_gpu", "triton")
REASONS = {"mosaic_gpu": "needs head_dim >= 64, got 32", "triton": "needs block_size 64, got 48"}


@pytest.fixture
def gpu(monkeypatch):
    """Let JAX see a GPU of this name and compute capability, or none."""

    def see(kind, capability=None):
        device = types.SimpleNamespace(device_kind=kind)
        if capability is not None:
            device.compute_capability = capability
        monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if kind is None else "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        for question in (_backend.gpu_kind, _backend.hopper_reason, _backend.triton_reason):
            question.cache_clear()

    yield see
    for question in (_backend.gpu_kind, _backend.hopper_reason, _backend.triton_reason):
        question.cache_clear()


def refuse(*names):
    return lambda name: REASONS[name] if name in names else None


# --- what the device is -------------------------------------------------------------------------


def test_a_cpu_has_no_gpu_and_both_kinds_of_kernels_say_so(gpu):
    gpu(None)
    assert _backend.gpu_kind() is None
    for reason in (_backend.hopper_reason(), _backend.triton_reason()):
        assert reason == "needs an NVIDIA GPU, but JAX computes on 'cpu'"


def test_hopper_runs_everything(gpu):
    gpu("NVIDIA H100 80GB HBM3", "9.0")
    assert _backend.gpu_kind() == "NVIDIA H100 80GB HBM3"
    assert _backend.hopper_reason() is None
    assert _backend.triton_reason() is None


@pytest.mark.parametrize("capability", ["8.0", "8.9", "10.0", "12.0"])
def test_another_gpu_runs_triton_kernels_only(gpu, capability):
    gpu("another GPU", capability)
    expected = f"needs compute capability 9.0 (Hopper), but another GPU has {float(capability)}"
    assert _backend.hopper_reason() == expected
    assert _backend.triton_reason() is None


@pytest.mark.parametrize(("capability", "found"), [("7.5", "7.5"), (None, "0.0")])
def test_an_old_gpu_runs_no_kernel(gpu, capability, found):
    gpu("old GPU", capability)
    assert _backend.hopper_reason().endswith(f"9.0 (Hopper), but old GPU has {found}")
    assert _backend.triton_reason() == (
        f"needs compute capability 8.0 or newer, but old GPU has {found}"
    )


def test_the_device_is_asked_once(gpu, monkeypatch):
    gpu("NVIDIA H100 80GB HBM3", "9.0")
    assert _backend.hopper_reason() is None
    monkeypatch.setattr(jax, "devices", lambda: 1 / 0)
    assert _backend.hopper_reason() is None
    assert _backend.gpu_kind() == "NVIDIA H100 80GB HBM3"


# --- a name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "a GPU"])
@pytest.mark.parametrize("name", [*KERNELS, "reference"])
def test_a_name_gets_that_one(gpu, kind, name):
    gpu(kind, "9.0")
    assert resolve("f", name, KERNELS, refuse()) == name


def test_the_reference_is_never_asked_for_objections(gpu):
    gpu(None)
    asked = []
    assert resolve("f", "reference", KERNELS, lambda name: asked.append(name)) == "reference"
    assert resolve("f", ("reference",), KERNELS, lambda name: asked.append(name)) == "reference"
    assert asked == []


@pytest.mark.parametrize("name", KERNELS)
def test_a_refused_name_is_an_error_with_the_reason(gpu, name):
    gpu("a GPU", "9.0")
    with pytest.raises(NotImplementedError) as caught:
        resolve("sparse_decode", name, KERNELS, refuse(*KERNELS))
    assert str(caught.value) == f"sparse_decode: implementation={name!r} {REASONS[name]}"


@pytest.mark.parametrize("asked", ["cuda", ("triton", "cuda"), ("cuda",), ""])
def test_an_unknown_name_is_refused_with_those_that_are_known(gpu, asked):
    gpu("a GPU", "9.0")
    name = asked if isinstance(asked, str) else "cuda"
    expected = f"^f: unknown implementation='{name}'; known: mosaic_gpu, triton, reference$"
    with pytest.raises(ValueError, match=expected):
        resolve("f", asked, KERNELS, refuse("triton"))


# --- none ---------------------------------------------------------------------------------------


def test_without_a_gpu_the_reference_runs_silently(gpu):
    gpu(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("f", None, KERNELS, refuse(*KERNELS)) == "reference"


def test_on_a_gpu_the_first_kernel_without_objection_runs_silently(gpu):
    gpu("a GPU", "9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("f", None, KERNELS, refuse()) == "mosaic_gpu"
        assert resolve("f", None, KERNELS, refuse("mosaic_gpu")) == "triton"
        assert resolve("f", None, KERNELS[::-1], refuse()) == "triton"


def test_a_gpu_that_refuses_every_kernel_warns_with_each_reason(gpu):
    gpu("a GPU", "9.0")
    with pytest.warns(UserWarning, match="runs instead") as caught:
        assert resolve("f", None, KERNELS, refuse(*KERNELS)) == "reference"
    assert [str(warning.message) for warning in caught] == [
        f"f: implementation={name!r} {REASONS[name]}; 'reference' runs instead" for name in KERNELS
    ]


def test_an_op_without_kernels_runs_its_reference(gpu):
    gpu("a GPU", "9.0")
    assert resolve("f", None, (), refuse()) == "reference"


# --- a sequence ---------------------------------------------------------------------------------


def test_the_first_of_a_sequence_without_objection_runs(gpu):
    gpu("a GPU", "9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("f", ("triton", "mosaic_gpu"), KERNELS, refuse("mosaic_gpu")) == "triton"
        assert resolve("f", ["reference", "triton"], KERNELS, refuse(*KERNELS)) == "reference"


def test_each_refusal_of_a_sequence_is_a_warning(gpu):
    gpu("a GPU", "9.0")
    with pytest.warns(UserWarning, match="runs instead") as caught:
        assert resolve("f", KERNELS, KERNELS, refuse("mosaic_gpu")) == "triton"
    (warning,) = caught
    assert str(warning.message) == (
        f"f: implementation='mosaic_gpu' {REASONS['mosaic_gpu']}; 'triton' runs instead"
    )
    with pytest.warns(UserWarning, match="runs instead") as caught:
        assert resolve("f", (*KERNELS, "reference"), KERNELS, refuse(*KERNELS)) == "reference"
    assert len(caught) == 2


@pytest.mark.parametrize("kind", [None, "a GPU"])
def test_a_sequence_of_refusals_is_an_error_with_all_reasons(gpu, kind):
    gpu(kind, "9.0")
    with pytest.raises(ExceptionGroup, match=r"f: none of \('mosaic_gpu', 'triton'\)") as caught:
        resolve("f", KERNELS, KERNELS, refuse(*KERNELS))
    assert [type(error) for error in caught.value.exceptions] == [NotImplementedError] * 2
    assert [str(error) for error in caught.value.exceptions] == [
        f"f: implementation={name!r} {REASONS[name]}" for name in KERNELS
    ]


def test_an_empty_sequence_can_run_nothing(gpu):
    gpu("a GPU", "9.0")
    with pytest.raises(ValueError, match="empty"):
        resolve("f", (), KERNELS, refuse())
