"""Sums beyond what the type of the outputs can hold."""

from __future__ import annotations

import pytest
import torch

from moeprune.scoring.tally import Tally


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_many_outputs_add_up_in_every_type(dtype):
    tally, count, size = Tally(2, 1, torch.device("cpu")), 2048, 64.0  # 2048 * 64 is more than float16 can hold
    first_S = torch.zeros(count, dtype=torch.int64)
    tally.add_outputs(first_S, first_S, torch.ones(count), torch.full((count, 4), size, dtype=dtype))
    found = tally.result("block")
    assert found.values["norm_sum"].tolist() == [[count * size * 2, 0]]
    assert found.gram_EDD.tolist() == [[[4 * (count * size) ** 2]], [[0]]]
