# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Makes `trainer/`: a file with everything that the original's trainer saves, for a tiny model.

Random state, optimiser and scheduler are real objects of torch and NumPy, so that reading the file
without torch is tested on what users have. `expected.npz` holds the weights as torch sees them.

Run by hand with torch 2.13; the tests read only what it wrote:

    python tests/golden/make_trainer_checkpoint.py
"""

import collections
import pathlib
import random

import numpy as np
import torch  # pyrefly: ignore[missing-import]  # only this generator needs it

OUT = pathlib.Path(__file__).parent / "trainer"
LAYERS, WIDTH, KV_WIDTH = 3, 32, 16


def main():
    """Make the checkpoint anew."""
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, the state of the legacy generator is what trainers save
    random.seed(0)

    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-4)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4])
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()

    weights = collections.OrderedDict(
        (
            f"module.model.layers.{number}.self_attn.q_future_proj.weight",
            torch.nn.Parameter(torch.randn(KV_WIDTH, WIDTH).to(torch.bfloat16)),
        )
        for number in range(LAYERS)
    )
    # A transposed view: its strides differ from its shape.
    entry = torch.randn(WIDTH, KV_WIDTH).to(torch.bfloat16).t()
    weights["module.model.layers.0.self_attn.q_curr_proj.weight"] = entry
    weights.__dict__["_metadata"] = collections.OrderedDict(version=1)
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002, as above
        "torch": torch.get_rng_state()[:64].clone(),
        "cuda": [torch.get_rng_state()[:64].clone()],
    }
    checkpoint = {
        "step": 1234,
        "micro_batches_seen": 4936,
        "gradient_accumulation_steps": 4,
        "world_size": 8,
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "indexer_optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": warm_up.state_dict(),
        "other_scheduler_state_dict": drops.state_dict(),
        "sparse_config": {
            "kernel_size": 4,
            "kernel_stride": 2,
            "init_blocks": 1,
            "block_size": 8,
            "window_size": 8,
            "topk": 4,
            "use_nope": False,
            "dense_len": -1,
            "training_kernel_size": 2,
            "training_kernel_stride": 1,
            "kl_target_align_pooling": "max",
        },
        "base_model_path": "owner/backbone",
        "rng_state": state,
        "rng_state_by_rank": [state],
        "accuracy": np.float64(0.5),
    }
    torch.save(checkpoint, OUT / "ckpt-1234.pt")
    plain = {name.removeprefix("module."): weight for name, weight in weights.items()}
    np.savez_compressed(
        OUT / "expected.npz", **{name: w.detach().float().numpy() for name, w in plain.items()}
    )


if __name__ == "__main__":
    main()
