# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Which cases `make test` leaves to `make test-wide`.

What costs time in a test is a program that is compiled for it. Here stand further cases of tests
that `make test` runs with others, and whole runs of experiments whose parts it tests one by one.
Every kernel, mode and model and both ways to fetch have cases that are not here.

A pattern is matched against the whole name of a test, its case included.
"""

import re
from collections.abc import Iterable

WIDE: dict[str, tuple[str, ...]] = {
    "tests/sparda_jax/test_golden_decode.py": (
        r".*\[minicpm (L660_T140 sparda|L600_T140_greedy sparse|L20.*|L560.*) \w+\]",
        r".*\[minicpm (L600_T70.*|L592.*) \w+\]",
        r".*\[nosa (L660_T140 (dense|sparda)|L600.*|L20.*|L560.*|L592.*) \w+\]",
        r"test_greedy_tokens_.*\[nosa\]",
    ),
    "tests/sparda_jax/test_golden_prefill.py": (
        r"test_(scores_of_pooled_keys|block_scores)_are_the_originals\[.* (20|1001) tokens-.*\]",
        r".*\[nosa .*-(dense|sparse)\]",
        r".*\[minicpm .*-dense\]",
        r"test_token_importance_.*\[\d+-(sparse|dense)\]",
        r"test_rounded_scores_choose_.*",
        r"test_where_a_score_lies_on_a_border_.*",
        r"test_without_parity_no_query_.*",
        r"test_without_parity_the_forecast_fills_.*",
        r"test_a_prompt_alone_.*\[(.* under a mask|no pooled importance|one token)\]",
    ),
    "tests/sparda_jax/test_golden_functions.py": (
        r"test_a_query_sees_as_many_.*\[(32|46|48|63|79|100)\]",
        r"test_block_scores_and_choices_.*\[(decode[124]|prefill[1245])\]",
    ),
    "tests/sparda_jax/training/test_golden_training.py": (
        r"test_the_first_step_.*\[(nosa 2/1|minicpm .*)\]",
        r"test_three_steps_of_adamw_.*",
        r"test_rounded_scores_route_.*",
        r"test_the_mean_alignment_.*",
        r"test_the_loss_of_given_.*\[k(2s1_mean|4s2_max)\]",
    ),
    "tests/sparda_jax/weights/test_golden_checkpoints.py": (
        r"test_decode_steps_.*\[(sparse-minicpm|.*-nosa)\]",
    ),
    "tests/sparda_jax/weights/test_huggingface.py": (
        r"test_a_golden_model_gives_the_originals_logits\[minicpm\]",
        r"test_dense_logits_.*\[(llama_group_[14]|llama_linear|llama_3|longrope_plain)\]",
        r"test_loading_needs_the_model_and_two_of_its_largest_tensor",
        r"test_a_mesh_spreads_what_it_divides_and_says_what_it_copies",
        r"test_a_selector_given_at_loading_.*",
    ),
    "tests/sparda_jax/test_decode_staged.py": (
        r"test_(steps_reuse_their_programs|a_step_without_missing_blocks)_.*",
        r"test_offloaded_generation_.*\[(minicpm-5-device_put|nosa-.*)\]",
        r"test_layers_that_choose_for_themselves_.*",
        r"test_bfloat16_is_bit_equal_too",
        r"test_device_memory_grows_.*\[in_graph\]",
        r"test_the_host_holds_every_.*\[device_put\]",
        r"test_the_first_step_fetches_.*",
        r"test_rows_that_have_ended_.*\[device_put\]",
    ),
    "tests/sparda_jax/test_decode.py": (
        r"test_step_by_step_.*\[(dense|random|dense with importance"
        r"|forecast without local blocks)\]",
        r"test_every_program_is_compiled_once_.*\[(resident-free|offload-.*)\]",
        r"test_a_step_of_several_graphs_.*\[[25]-.*\]",
    ),
    "tests/sparda_jax/test_many_cases.py": (
        r"test_choices_are_those_of_loops",
        r"test_blocks_of_ragged_rows_.*\[(query|forecast)\]",
        r"test_gathered_attention_is_that_of_loops",
        r"test_masked_attention_of_ragged_rows_is_that_of_loops",
    ),
    "tests/sparda_jax/test_model.py": (
        r"test_bfloat16_stays_.*",
        r"test_gradients_under_a_mask_.*\[minicpm\]",
        r"test_choosing_every_block_.*\[(minicpm-sparda-gather|nosa-sparse-gather)\]",
        r"test_the_decoder_is_the_one_.*\[(nosa-(dense|sparse)|minicpm-sparda)-False\]",
        r"test_gathering_and_masking_.*\[minicpm-(dense|sparse)\]",
        r"test_recomputing_layers_changes_no_gradient",
        r"test_full_size_models_.*",
        r"test_a_ragged_batch_chooses_.*\[(minicpm-sparda|nosa-sparse)\]",
    ),
    "tests/sparda_jax/test_prefill.py": (
        r"test_chunks_hold_short_prompts_and_cap_long_ones",
        r"test_chunks_give_.*\[(nosa|dense)-8\]",
        r"test_the_last_logits_.*\[(nosa|dense)\]",
    ),
    "tests/sparda_jax/test_session.py": (
        r"test_prompts_shorter_than_dense_below_are_dense_.*",
        r"test_the_books_(do_not_pile_up|are_kept)_.*",
        r"test_another_selector_may_rank_for_the_prompt",
        r"test_prompts_prefilled_in_groups_.*\[resident\]",
        r"test_longrope_takes_the_factors_of_what_a_row_may_reach",
        r"test_a_short_offloaded_batch_keeps_every_block_in_slots",
    ),
    "tests/sparda_jax/kv/test_pack.py": (
        r"test_a_request_of_a_batcher_.*",
        r"test_both_ways_to_fetch_.*",
        r"test_what_is_fetched_.*\[(in_graph-float8_e4m3fn|device_put-int8)\]",
        r"test_a_block_that_never_left_.*\[device_put\]",
    ),
    "tests/sparda_jax/kv/test_host_lifetime.py": (
        r"test_what_is_left_open_.*\[(a child of a fork ends first|it ends"
        r"|it asks for an exit with a status|it ends while a program still reads)\]",
        r"test_an_interrupt_unlocks\[with .*\]",
    ),
    "tests/sparda_jax/evaluation/test_perplexity.py": (
        r"test_batches_add_up",
        r"test_every_token_has_the_likelihood_.*\[(dense|sparse)\]",
    ),
    "tests/sparda_jax/evaluation/test_recall.py": (
        r"test_recall_and_overlap_lie_.*\[forecast\]",
        r"test_selectors_need_different_names",
        r"test_a_model_with_token_importance_is_measured_by_.*",
    ),
    "tests/sparda_jax/training/test_attend.py": (
        r"test_masked_tiles_attend_.*\[(False-30|False-64|True-8)\]",
    ),
    "tests/pallas_kernels/test_sparse_attention.py": (
        r"test_a_float16_tile_of_the_mosaic_kernel_.*",
        r"test_the_mosaic_kernel_gives_.*\[(one query|one head a group|three heads a group"
        r"|own block only|one position|an empty cache|many blocks|everything)\]",
        r"test_the_triton_kernel_gives_.*\[(one query|one head a group|three heads a group"
        r"|own block only|everything|neighbours agree|one position|a bias per key|many blocks)\]",
        r"test_three_computing_warpgroups_.*",
        r"test_other_tiles_of_the_mosaic_kernel_give_.*",
        r"test_other_tiles_of_the_mosaic_kernel_lower_.*\[1-.*\]",
        r"test_a_kernel_lowers_for_cuda_at_128k\[.*-(1|4)-(32|64)\]",
        r"test_a_kernel_lowers_for_cuda_at_other_shapes\[.*'W': (16|128).*\]",
        r"test_a_tile_lists_its_blocks_.*\[(8-2-16|12-3-16|64-1-2048|4-1-2048)\]",
    ),
    "tests/pallas_kernels/test_query_scores.py": (
        r"test_a_kernel_gives_.*\[(one query|a group of one|a group of three|one cell a block"
        r"|three cells a block|.* blocks than cells fill|another scale|some queries and padding"
        r"|a chunk of a group of (one|three)|a chunk at the beginning|a loud chunk"
        r"|a chunk that is padded|one head takes it all)\]",
    ),
    "tests/pallas_kernels/test_block_scores.py": (
        r"test_a_kernel_gives_.*\[(one query|padding|three cells a block|some queries"
        r"|.* blocks than cells fill|a chunk of the past|a chunk seen from the start"
        r"|a chunk of repeated queries|a chunk at the beginning)\]",
    ),
    "tests/pallas_kernels/test_append_kv.py": (
        r"test_the_measured_cases_run_where_there_is_no_gpu",
        r"test_the_(interpreted_kernel|reference)_has_.*\[(bfloat16 rotated in bfloat16"
        r"|no other heads|no bias|windows side by side|windows of one key"
        r"|fewer other heads than KV heads)\]",
        r"test_the_kernel_lowers_.*\[(4-.*|.*-64-.*)\]",
    ),
    "tests/pallas_kernels/test_sparse_decode.py": (
        r"test_the_interpreted_kernel_.*\[(one head a KV head-two|every block-two"
        r"|equal positions-two|blocks of two tiles-two|.*-one program a head)\]",
    ),
    "tests/pallas_kernels/test_plan_fetch.py": (
        r"test_the_kernel_makes_.*\[(a row that does nothing|everything changes"
        r"|more slots than blocks|a ragged batch)\]",
    ),
    "tests/pallas_kernels/test_select_blocks.py": (
        r"test_the_reference_is_the_choice_.*\[(one query|every score equal|only pinned blocks"
        r"|fewer blocks than are selected|a row of several vectors)\]",
        r"test_the_kernel_makes_.*\[(one query|every score equal|infinite scores"
        r"|fewer blocks than are selected|only pinned blocks|most blocks unscored)\]",
    ),
    "tests/pallas_kernels/test_forecast_kl.py": (
        r"test_the_teacher_kernels_.*\[(mean|equal strides|coarser fine keys|one window a tile"
        r"|one query)\]",
        r"test_the_loss_kernel_.*\[(one cell a block|one query)\]",
    ),
    "tests/pallas_kernels/test_write_blocks.py": (
        r"test_the_kernel_is_the_definition\[.*ctas=[12].*\]",
    ),
    "tests/pallas_kernels/test_gather_blocks.py": (
        r"test_the_kernel_is_the_definition\[(one record|everything that is listed"
        r"|a negative count|one move is listed|long blocks)\]",
    ),
    "tests/experiments/test_host_dtype.py": (
        r"test_every_dtype_gives_a_row_.*",
        r"test_a_reading_judges_every_token_.*",
    ),
    "tests/experiments/test_demo.py": (r"test_the_evaluation_of_the_shipped_model_.*",),
    "tests/experiments/test_train_backbone.py": (
        r"test_a_run_that_was_stopped_ends_with_the_same_weights",
        r"test_a_state_of_another_model_is_refused_with_both_shapes",
        r"test_alignment_is_small_where_.*",
    ),
    "tests/experiments/test_train_shipped_heads.py": (
        r"test_training_changes_the_heads_on_the_disk_and_nothing_else",
    ),
    "tests/experiments/test_exam.py": (
        r"test_the_choices_of_the_first_row_are_kept",
        r"test_other_heads_rank_on_the_states_of_the_first_model",
        r"test_(bits_per_byte_agree_with_perplexity|a_short_last_batch_changes_nothing)",
    ),
    "tests/experiments/test_load_8b.py": (r"test_a_run_leaves_a_record_and_no_checkpoint",),
    "tests/sparda_jax/test_parity.py": (r"test_the_fast_engines_prefill_is_.*",),
    "tests/sparda_jax/training/test_step.py": (
        r"test_evaluation_gives_the_metrics_.*",
        r"test_the_sums_of_a_ragged_batch_.*",
        r"test_fifty_steps_lower_the_loss_and_raise_the_recall",
        r"test_how_blocks_are_read_.*",
        r"test_each_loss_reaches_one_weight_as_differentiation_says",
        r"test_micro_batches_add_up_to_the_batch",
        r"test_queries_that_an_own_query_teacher_says_nothing_of_.*",
        r"test_a_model_with_token_importance_supervises_.*",
        r"test_a_bf16_backbone_trains_f32_heads",
    ),
    "tests/sparda_jax/training/test_loop.py": (r"test_every_step_is_logged_once_.*",),
    "tests/sparda_jax/selectors/test_every_selector.py": (
        r"test_(its_scores_are_finite|a_summary_extended|a_ragged_batch|tokens_after)_.*"
        r"\[(random|previous_query)\]",
    ),
    "tests/experiments/test_bench_decode.py": (
        r"test_the_record_keeps_rows_of_other_cells",
        r"test_a_drift_goes_round_.*",
        r"test_every_method_gives_rows",
        r"test_more_slots_never_miss_more_on_the_shipped_model",
        r"test_a_trace_is_written_.*",
        r"test_packed_records_move_a_quarter_.*",
        r"test_every_step_misses_exactly_.*\[minicpm4_1_8b-sparda_offload\]",
        r"test_a_profile_of_a_machine_without_kernels_is_idle",
    ),
    "tests/experiments/test_bench_kernels.py": (r"test_a_run_survives_every_kind_of_case",),
    "tests/experiments/test_kernel_cases.py": (r"test_a_step_finds_as_many_blocks_missing_.*",),
    "tests/experiments/test_chat.py": (
        r"test_(an_answer_streams|pieces_come_one_by_one|questions_are_read)_.*",
        r"test_(another_temperature|the_rate_leaves_out|a_status_line)_.*",
    ),
    "tests/experiments/test_backbone_data.py": (
        r"test_(workers_give_the_batches|an_error_in_a_worker)_.*",
    ),
    "tests/experiments/test_train_forecast.py": (
        r"test_a_killed_run_resumes_to_the_same_weights",
        r"test_heads_are_fresh_or_the_models_own",
        r"test_a_run_writes_metrics_checkpoints_and_heads",
    ),
    "tests/experiments/test_convert.py": (r"test_the_command_line_knows_the_three_commands",),
    "tests/sparda_jax/test_batcher.py": (
        r"test_a_request_draws_by_its_number_whoever_shares_the_batch",
    ),
    "tests/sparda_jax/test_rope.py": (r"test_rotations_are_one_function_of_device_arrays",),
    "tests/pallas_kernels/test_op_folders.py": (
        r"test_the_real_cases_are_lowered_for_cuda\[sparse_attention-mosaic_gpu\]",
    ),
    "tests/sparda_jax/selectors/test_nosa.py": (r"test_the_published_budget_.*",),
    "tests/sparda_jax/test_shipped.py": (r"test_what_is_saved_is_loaded_bit_for_bit\[float32\]",),
    "tests/sparda_jax/test_tracking.py": (r"test_tensorboard_files_are_written_.*",),
}


def is_wide(path: str, name: str) -> bool:
    """Tell whether `make test` leaves a test out.

    Args:
        path: of its file, from the root of the repository.
        name: its name and case: `test_it[case]`.
    """
    return any(re.fullmatch(pattern, name) for pattern in WIDE.get(path, ()))


def unmatched(tests: Iterable[tuple[str, str]]) -> list[str]:
    """List the patterns that no test of their file matches, and the files that have no test.

    Args:
        tests: path and name of every test.
    """
    names: dict[str, list[str]] = {}
    for path, name in tests:
        names.setdefault(path, []).append(name)
    return [
        f"{path}: {pattern}"
        for path, patterns in WIDE.items()
        for pattern in patterns
        if not any(re.fullmatch(pattern, name) for name in names.get(path, ()))
    ]
