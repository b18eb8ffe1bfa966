"""Which weights and strengths are tried, and which drafts are chosen."""

import pytest
import torch
from torch.nn.functional import normalize

from lora_lab.sampling.drafts import Variant, best_drafts, variants


def test_the_usual_variant_comes_first_and_the_budget_limits():
    tried = variants(None, None, 0.95, budget=4, steps=8)
    assert tried[0] == Variant(1.0, 0.95) and len(tried) == 4
    assert len({(v.lora_weight, int(8 * v.strength)) for v in tried}) == 4, "each draft differs"
    assert variants(None, None, 0.95, budget=1, steps=8) == tried[:1]


def test_what_is_given_stays():
    assert {v.strength for v in variants(None, 0.5, 0.95, budget=6, steps=8)} == {0.5}
    assert {v.lora_weight for v in variants(0.7, None, 0.95, budget=6, steps=8)} == {0.7}


@pytest.mark.parametrize(("strength", "steps"), [(0.05, 8), (0.12, 8), (1.0, 1)])
def test_no_draft_is_without_a_step(strength, steps):
    tried = variants(None, None, strength, budget=6, steps=steps)
    assert all(int(steps * v.strength) >= 1 for v in tried)
    assert bool(tried) == (int(steps * strength) >= 1)


def test_the_best_drafts_that_differ_come_first():
    first, second, third = normalize(torch.randn((3, 4, 8), generator=torch.Generator().manual_seed(0)), dim=-1)
    parts = torch.stack([first, first, second, third])
    assert best_drafts([0.9, 0.8, 0.5, 0.7], parts, 1) == [0]
    assert best_drafts([0.9, 0.8, 0.5, 0.7], parts, 3) == [0, 3, 2]
    assert best_drafts([0.9, 0.8, 0.5, 0.7], parts, 4) == [0, 3, 2, 1], "a twin of the best where others are missing"
    assert best_drafts([0.5, 0.5], parts[:2], 1) == [0], "the first of equals"
