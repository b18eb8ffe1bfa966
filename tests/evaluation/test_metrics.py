"""The formulas of scores, on embeddings with known results."""

import math
import re
from dataclasses import replace

import pytest
import torch

from lora_lab.evaluation import metrics
from lora_lab.evaluation.metrics import Scale
from lora_lab.launch.config import compose

X, Y, Z = torch.eye(3)
HALFWAY = (X + Y) / math.sqrt(2)  # 45 degrees from both
HALF = 1 / math.sqrt(2)


def rows(*vectors):
    return torch.stack(vectors)


def test_subject_is_the_mean_cosine_to_the_references():
    assert metrics.subject(rows(X, HALFWAY, Z), rows(X, Y)).tolist() == pytest.approx([0.5, HALF, 0])


def parts_of(*pictures):
    """Pictures of three parts each."""
    return torch.stack([torch.stack(parts) for parts in pictures])


# A face that every drawing has, a flower that only the character has, hats that come and go.
FACE, FLOWER, HAT, CAP = torch.eye(4)
REFERENCES = parts_of((FACE, FLOWER, HAT), (FLOWER, FACE, CAP), (FACE, CAP, FLOWER))
BASE = parts_of((FACE, HAT, CAP), (CAP, FACE, FACE))


def found(*pictures, references=REFERENCES, base=BASE):
    return metrics.DistinctiveParts.of(references, base).found(parts_of(*pictures)).tolist()


def test_what_all_references_have_and_the_base_lacks_is_the_character():
    weights = metrics.DistinctiveParts.of(REFERENCES, BASE).weights
    assert weights[0, 1] > 0 and weights[0, 0] == weights[1, 1] == 0, "the flower, and not the face"
    with_flower, without = found((FACE, FLOWER, CAP), (FACE, HAT, CAP))
    assert with_flower > 0.9 and without < 0.1


def test_the_base_has_found_0_and_the_references_1_of_each_other():
    pictures = torch.randn((6, 4, 8), generator=torch.Generator().manual_seed(0)) + 3
    character = metrics.DistinctiveParts.of(pictures[:4], pictures[4:])
    assert character.found(pictures[4:]).mean() == pytest.approx(0, abs=1e-5)
    others = []
    for i in range(4):  # each among the others, by a formula of its own
        rest = [k for k in range(4) if k != i]
        cosines = metrics.best_cosines(character.references[rest], character.references[i : i + 1])[..., 0]
        others.append(((cosines - character.before[rest]) * character.weights[rest]).sum())
    assert sum(others).item() / 3 == pytest.approx(1, abs=0.35)


def test_positions_do_not_matter_and_channels_that_are_large_everywhere_are_standardised():
    plain = found((FACE, FLOWER, HAT))
    assert found((HAT, FACE, FLOWER)) == pytest.approx(plain)
    offset = 1000 * FACE + 1000 * HAT
    shifted = found((FACE + offset, FLOWER + offset, HAT + offset), references=REFERENCES + offset, base=BASE + offset)
    assert shifted == pytest.approx(plain, abs=1e-3)


def test_a_single_reference_is_found_in_itself_and_references_like_the_base_in_nothing():
    assert found((FACE, FLOWER, HAT), references=REFERENCES[:1])[0] == pytest.approx(1)
    assert found((FACE, FLOWER, HAT), references=BASE) == [0]


def test_prompt_compares_with_the_text_of_the_image():
    assert metrics.prompt(rows(X, X, HALFWAY), rows(X, Y), [0, 1, 1]).tolist() == pytest.approx([1, 0, HALF])


def test_contrast_is_0_if_an_image_fits_every_text_equally():
    texts = rows(X, Y, Z)
    got = metrics.contrast(rows(X, HALFWAY, Z, rows(X, Y, Z).sum(0) / math.sqrt(3)), texts, [0, 0, 0, 1])
    assert got.tolist() == pytest.approx([1, HALF - HALF / 2, -0.5, 0], abs=1e-6)


def test_contrast_of_a_single_text_is_its_cosine():
    assert metrics.contrast(rows(HALFWAY), rows(X), [0]).tolist() == pytest.approx([HALF])


def test_leakage_compares_with_the_base_s_image_of_the_same_prompt():
    assert metrics.leakage(rows(X, HALFWAY, Z), rows(X, X, Y)).tolist() == pytest.approx([0, 1 - HALF, 1])


def test_diversity_compares_seeds_of_one_prompt_and_needs_two():
    got = metrics.diversity(rows(X, Y, X, X, Z), [0, 0, 1, 1, 2])
    assert got[:4].tolist() == pytest.approx([1, 1, 0, 0]) and got[4].isnan()


def test_memorised_images_are_nearer_than_other_training_images():
    training = rows(X, HALFWAY, Z)  # X and HALFWAY are 45 degrees apart, Z is 90 from both
    near_x = torch.nn.functional.normalize(X + 0.1 * Z, dim=0)
    far_from_x = torch.nn.functional.normalize(X - 1.5 * Y, dim=0)  # 56 degrees from X, its nearest
    near_z = torch.nn.functional.normalize(Z + 0.9 * X, dim=0)  # 42 degrees from Z, whose neighbours are at 90
    assert metrics.memorised(rows(near_x, far_from_x, near_z), training).tolist() == [1, 0, 1]
    assert metrics.memorised(rows(X), rows(X)).isnan().all()


AVATARS = [re.compile(pattern) for pattern in compose().score.attributes]


@pytest.mark.parametrize(
    ("prompt", "caption", "read"),
    [
        ("A HANA_TOFU with a green background, wearing sunglasses, smiling",
         "A HANA_TOFU with a green background, wearing sunglasses, smiling", [True] * 3),
        ("A HANA_TOFU with a green background, wearing sunglasses, smiling",
         "A HANA_TOFU with a purple background, wearing round glasses, laughing", [False] * 3),
        ("A HANA_TOFU with a white background, wearing a red party hat, laughing",
         "A HANA_TOFU with a white background, wearing a blue party hat, laughing", [True, False, True]),
        ("A HANA_TOFU with a blue background, with a moustache, smiling, raising both hands",
         "A HANA_TOFU with a Blue background, with a mustache, raising its left hand", [True, True, False, False]),
        ("A HANA_TOFU with a pink background, wearing a blue shirt, with long black hair",
         "A HANA_TOFU with long black hair, wearing a red shirt, with a pink background", [True, False, True]),
        ("A HANA_TOFU", "A HANA_TOFU with a pink background", []),
    ],
)  # fmt: skip
def test_attributes_compare_the_caption_with_the_prompt(prompt, caption, read):
    assert metrics.attributes(prompt, caption, AVATARS) == read


@pytest.mark.parametrize("option", ["avatars", "scenes"])
def test_every_prompt_has_attributes_and_a_perfect_caption_names_them_all(option):
    score = compose(f"score={option}").score
    patterns = [re.compile(pattern) for pattern in score.attributes]
    for prompt in score.prompts:
        read = metrics.attributes(prompt, prompt, patterns)
        assert read and all(read), prompt
    for pattern in patterns:
        assert any(pattern.search(prompt.casefold()) for prompt in score.prompts) or option == "avatars", pattern


SCALE = Scale(contrast_before=0.4, attributes_before=0.9, contrast_others_before=0.5)
NO_ATTRIBUTES = replace(SCALE, attributes_before=math.nan)


def combined(parts, contrast, attributes, others, scale=SCALE):
    return metrics.combined(*map(torch.tensor, (parts, contrast, attributes, others)), scale).item()


def test_the_score_is_1_for_perfect_likeness_and_prompts():
    assert combined(1.0, 0.4, 0.9, 0.5) == pytest.approx(1)
    assert combined(1.0, 0.4, math.nan, 0.5, NO_ATTRIBUTES) == pytest.approx(1)
    assert combined(1.1, 0.7, 1.0, 0.6) == pytest.approx(1), "better than all that can be is no better"


@pytest.mark.parametrize("nothing", [(0.0, 0.4, 0.9, 0.5), (-0.1, 0.4, 0.9, 0.5), (0.6, 0.0, 0.0, -0.1)])
def test_the_score_is_0_if_nothing_was_learnt_or_followed(nothing):
    assert combined(*nothing) == pytest.approx(0)


def test_the_score_has_the_documented_weights():
    assert combined(0.5, 0.4, 0.45, 0.25) == pytest.approx((0.5 * (1 + 0.5 + 0.5) / 3) ** 0.5)
    assert combined(0.5, 0.4, math.nan, 0.25, NO_ATTRIBUTES) == pytest.approx((0.5 * (1 + 0.5) / 2) ** 0.5)


def test_each_component_alone_raises_the_score():
    middle = (0.5, 0.2, 0.5, 0.25)
    for i, better in enumerate((0.6, 0.3, 0.6, 0.3)):
        assert combined(*middle[:i], better, *middle[i + 1 :]) > combined(*middle)


def mean_of(means):
    return means["subject"] * 2


def test_an_interval_is_wide_for_few_different_images():
    torch.manual_seed(0)
    few, many = 0.5 + 0.1 * torch.randn(10), 0.5 + 0.1 * torch.randn(1000)
    got = [metrics.estimates([{"subject": numbers}], mean_of)["subject"] for numbers in (few, many)]
    widths = [estimate.high - estimate.low for estimate in got]
    # of a mean of n numbers 1.96 times its standard error on either side
    expected = [2 * 1.96 * numbers.std(correction=0).item() / len(numbers) ** 0.5 for numbers in (few, many)]
    assert widths == pytest.approx(expected, rel=0.12)
    same = metrics.estimates([{"subject": torch.full((8,), 0.25)}], mean_of)
    assert (same["subject"].low, same["subject"].value, same["subject"].high) == (0.25, 0.25, 0.25)
    assert same["score"].value == 0.5 and next(iter(same)) == "score"


def test_images_of_a_group_are_resampled_together_and_reproducibly():
    a = torch.linspace(0, 1, 20)
    group = {"subject": a, "mirrored": 1 - a}
    got = metrics.estimates([group], lambda means: means["subject"] + means["mirrored"])
    assert (got["score"].low, got["score"].high) == (1, 1), "what one gains by a resampling the other loses"
    assert got == metrics.estimates([group], lambda means: means["subject"] + means["mirrored"])


def test_nan_is_excluded_and_all_nan_is_none():
    got = metrics.estimates(
        [{"subject": torch.tensor([0.2, math.nan, 0.4]), "diversity": torch.full((3,), math.nan)}], mean_of
    )
    assert got["subject"].value == pytest.approx(0.3) and got["diversity"] is None


def test_the_mean_of_estimates_is_more_certain_than_each():
    one, other = metrics.Estimate(0.4, 0.2, 0.5), metrics.Estimate(0.8, 0.6, 0.9)
    mean = metrics.mean_estimate([one, other, None])
    assert (mean.value, mean.low, mean.high) == (0.6, 0.4586, 0.6707)  # 0.2 and 0.1 away, by the square root of 2
    assert metrics.mean_estimate([one]) == one and metrics.mean_estimate([None]) is None
