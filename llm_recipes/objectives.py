"""What a model learns from a window: the collators that turn windows into inputs and labels."""

import numpy as np
import torch


def causal_lm(rows: list[dict]) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, both `(B, T)`; the model shifts the labels, so a window has T - 1 targets.

    There is no attention mask: windows have no padding, and without one SDPA keeps its causal fast path.
    """
    input_ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    return {"input_ids": input_ids, "labels": input_ids}
