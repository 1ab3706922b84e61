# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What a cache did while it decoded: the numbers behind every claim about offloading."""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """What the cache did, by step and layer.

    Attributes:
        resident: chosen blocks that stood in a slot, the tail among them.
        fetched: chosen blocks that had to move.
        evicted: blocks that lost their slot.
        record_bytes: of one block and KV head.
    """

    resident: Int[np.ndarray, "steps L"]
    fetched: Int[np.ndarray, "steps L"]
    evicted: Int[np.ndarray, "steps L"]
    record_bytes: int

    @property
    def fetched_bytes(self) -> Int[np.ndarray, "steps L"]:
        """Bytes of the fetched records."""
        return self.fetched * self.record_bytes

    @property
    def hit_rate(self) -> float:
        """Share of the chosen blocks that were resident; 1 if nothing was chosen."""
        chosen = int(self.resident.sum()) + int(self.fetched.sum())
        return 1.0 if chosen == 0 else int(self.resident.sum()) / chosen
