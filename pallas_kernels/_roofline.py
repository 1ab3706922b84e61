# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What an op has to move and compute, so that a time becomes a share of a ceiling."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

Ceiling = Literal["copy", "h2d", "matmul"]
"""What bounds an op: device memory (bytes read and written by a device copy), the link from the
host, or the tensor cores (bf16 matmul)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least that an op must do.

    Attributes:
        bytes: read from and written to the memory that bounds it.
        flops: multiplications and additions, two for each fused pair.
        ceiling: what bounds it.
    """

    bytes: int
    flops: int
    ceiling: Ceiling = "copy"

    def rate(self, milliseconds: float) -> float:
        """Compute the rate in bytes/s, or FLOP/s for an op that the tensor cores bound.

        Example:
            >>> Work(bytes=3_000_000, flops=0).rate(1.0)
            3000000000.0
        """
        amount = self.flops if self.ceiling == "matmul" else self.bytes
        return amount / (milliseconds * 1e-3)

    def share(self, milliseconds: float, ceilings: Mapping[str, float]) -> float:
        """Compute the share of the measured ceiling that a time reaches.

        Args:
            milliseconds: of one call.
            ceilings: bytes/s or FLOP/s by name.
        """
        return self.rate(milliseconds) / ceilings[self.ceiling]
