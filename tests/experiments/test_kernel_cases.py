# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The case of several ops in a row: what it plans, what it refuses, and that it lowers for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_cases import selection
from experiments.kernel_timing import Effort, measure
from pallas_kernels import _backend, _compat

ONCE = Effort(min_operand_bytes=1, max_sets=1, repeats=1, seconds=0.01)
DECODE, PREFILL = selection.cases(tiny=True)


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_the_tiny_cases_run_and_are_right(case):
    assert case.op == "selection"
    found = measure(case, ONCE, None)
    if found.check_error is not None:
        raise found.check_error


def test_a_step_finds_as_many_blocks_missing_as_its_name_says():
    operands = DECODE.operands(3)
    shape = DECODE.call.keywords["shape"]
    plan = DECODE.call(*operands)
    assert plan.counts.tolist() == [4 * (9 - 2), 4 * 2, 4 * 2]  # four rows of nine blocks
    assert "missing 2" in DECODE.shape
    table, slot_blocks = (np.asarray(x) for x in operands[4:6])
    resident = np.take_along_axis(table, slot_blocks, axis=-1)
    np.testing.assert_array_equal(resident, np.broadcast_to(np.arange(12), resident.shape))
    selection._check_plan(plan, operands, shape=shape)


def test_a_plan_for_other_blocks_is_refused():
    operands = DECODE.operands(0)
    shape = DECODE.call.keywords["shape"]
    plan = DECODE.call(*operands)
    with pytest.raises(AssertionError, match="slots"):
        selection._check_plan(
            dataclasses.replace(plan, slots=plan.slots + 1), operands, shape=shape
        )


def test_a_choice_of_other_blocks_is_refused():
    operands = PREFILL.operands(0)
    choice = PREFILL.call(*operands)
    wrong = dataclasses.replace(choice, ids=choice.ids.at[:, :, 0, 0].add(1))
    with pytest.raises(AssertionError, match=r"share=0.5 of the rows are alike, less than 0.99"):
        selection._check_choice(wrong, operands, shape=PREFILL.call.keywords["shape"])


def test_a_prompt_is_chosen_for_as_in_one_piece():
    shape = PREFILL.call.keywords["shape"]
    operands = PREFILL.operands(1)
    whole = shape.choose(*operands, implementation="reference")
    np.testing.assert_array_equal(PREFILL.call(*operands).ids, whole.ids)


def test_the_real_cases_are_lowered_for_cuda(monkeypatch):
    monkeypatch.setattr(_backend, "triton_reason", lambda: None)
    for case in selection.cases():
        shapes = jax.eval_shape(lambda case=case: case.operands(0))
        kernels = _compat.lowered(case.call, *shapes).as_text().count("custom_call @")
        decodes = jnp.shape(shapes[0])[1] == 1
        assert kernels == {"reference": 0}.get(case.implementation, 4 if decodes else 2)
