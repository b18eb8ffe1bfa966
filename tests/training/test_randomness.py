import pytest
import torch

from lora_lab.launch.config import compose
from lora_lab.training.randomness import (
    batch_indices,
    batches_per_epoch,
    choose,
    generator,
    offset_noise,
    pyramid_noise,
    sample_randomness,
    seed_of,
    shuffle_caption_tags,
    timestep_at,
)

LOSS = compose("stage=train").loss
ALL_ON = compose("loss.noise_offset=0.1", "loss.pyramid_iterations=6", "loss.timestep_sampling=logit_normal").loss


def test_random_numbers_of_earlier_versions_are_unchanged():
    """Pinned: a run begun with an older version goes on with the same noise."""
    for key, timestep, coins, numbers in (
        ((0, 5, 2), 110, (True, False), [0.7286866, -1.1788789, -0.6293774, 0.5116912]),
        ((7, 123, 0), 16, (False, False), [0.6189024, 0.0027619, 1.5863043, -0.1394519]),
    ):
        drawn = sample_randomness(*key, (4, 8, 8), LOSS, 0.1)
        assert drawn.timestep == timestep and (drawn.flip, drawn.drop_caption) == coins
        assert [*drawn.noise[0, 0, :3].tolist(), drawn.noise[3, 7, 7].item()] == pytest.approx(numbers, abs=1e-6)


@pytest.mark.parametrize("loss", [LOSS, ALL_ON], ids=["plain", "all options"])
def test_random_numbers_depend_on_seed_step_and_sample_alone(loss):
    first = sample_randomness(0, 5, 2, (4, 8, 8), loss, 0.1)
    torch.rand(100)  # whatever else draws in between
    again = sample_randomness(0, 5, 2, (4, 8, 8), loss, 0.1)
    assert first.timestep == again.timestep and torch.equal(first.noise, again.noise)
    assert (first.flip, first.drop_caption) == (again.flip, again.drop_caption)
    for other in (
        sample_randomness(1, 5, 2, (4, 8, 8), loss, 0.1),
        sample_randomness(0, 6, 2, (4, 8, 8), loss, 0.1),
        sample_randomness(0, 5, 3, (4, 8, 8), loss, 0.1),
    ):
        assert not torch.equal(first.noise, other.noise)


def test_timesteps_flips_and_dropped_captions_are_uniform():
    draws = [sample_randomness(0, step, 0, (1, 1, 1), LOSS, 0.25) for step in range(2000)]
    timesteps = torch.tensor([d.timestep for d in draws], dtype=torch.float64)
    assert timesteps.min() < 10 and timesteps.max() > 989
    assert abs(timesteps.mean().item() - 499.5) < 20  # three standard errors
    assert abs(sum(d.drop_caption for d in draws) / 2000 - 0.25) < 0.03
    assert abs(sum(d.flip for d in draws) / 2000 - 0.5) < 0.035


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("loss.noise_offset=0.1", {"noise"}),
        ("loss.pyramid_iterations=6", {"noise"}),
        pytest.param("loss.timestep_sampling=logit_normal", {"timestep"}, marks=pytest.mark.slow),
        pytest.param("loss.min_timestep=900", {"timestep"}, marks=pytest.mark.slow),
        ("loss.max_timestep=100", {"timestep"}),
    ],
)
def test_an_option_changes_no_other_random_numbers(override, changed):
    for step in range(5):
        plain, other = (sample_randomness(0, step, 0, (4, 8, 8), loss, 0.1) for loss in (LOSS, compose(override).loss))
        found = {
            key
            for key, value in vars(plain).items()
            if not torch.equal(*map(torch.as_tensor, (value, vars(other)[key])))
        }
        assert found == changed


def test_the_discount_of_the_pyramid_reaches_the_noise():
    loss, other = (compose("loss.pyramid_iterations=6", f"loss.pyramid_discount={d}").loss for d in (0.3, 0.9))
    noise = sample_randomness(0, 0, 0, (4, 8, 8), LOSS, 0.1).noise
    for settings in (loss, other):
        drawn = sample_randomness(0, 0, 0, (4, 8, 8), settings, 0.1).noise
        source = generator(0, "pyramid noise", 0, 0)
        assert torch.equal(drawn, pyramid_noise(noise, 6, settings.pyramid_discount, source))


def timesteps_of(*overrides, count=2000):
    loss = compose(*overrides).loss
    return torch.tensor(
        [sample_randomness(0, step, 0, (1, 1, 1), loss, 0.0).timestep for step in range(count)]
    ).double()


def test_timesteps_cover_their_range():
    drawn = timesteps_of("loss.min_timestep=200", "loss.max_timestep=210")
    assert sorted(set(drawn.tolist())) == list(range(200, 210))
    drawn = timesteps_of("loss.min_timestep=200", "loss.max_timestep=210", "loss.timestep_sampling=logit_normal")
    assert sorted(set(drawn.tolist())) == list(range(200, 210))


def test_logit_normal_timesteps_are_the_sigmoids_of_normal_draws():
    for mean, std in ((0.0, 1.0), (-1.0, 0.5)):
        drawn = timesteps_of("loss.timestep_sampling=logit_normal", f"loss.logit_mean={mean}", f"loss.logit_std={std}")
        share = (drawn + 0.5) / 1000
        logits = (share / (1 - share)).log()
        assert logits.mean().item() == pytest.approx(mean, abs=0.07) and logits.std().item() == pytest.approx(
            std, rel=0.05
        )


def test_fractions_0_and_1_are_the_first_and_the_last_timestep():
    assert [timestep_at(share, 0, 1000) for share in (0.0, 0.5, 0.9999, 1.0)] == [0, 500, 999, 999]
    assert [timestep_at(share, 200, 300) for share in (0.0, 0.25, 1.0)] == [200, 225, 299]


def test_offset_noise_adds_one_number_per_channel():
    noise = torch.randn(4, 8, 8, generator=generator("white"))
    shift = offset_noise(noise, 0.1, generator("shift")) - noise
    assert torch.allclose(shift, shift[:, :1, :1].expand_as(shift), atol=1e-6)
    shifts = torch.stack([offset_noise(noise, 0.1, generator(i)) - noise for i in range(500)])[..., 0, 0]
    assert shifts.std(dim=0).tolist() == pytest.approx([0.1] * 4, rel=0.15)
    assert (torch.corrcoef(shifts.T) - torch.eye(4)).abs().max() < 0.2, "channels shift alike"


def test_pyramid_noise_has_unit_deviation_and_is_coarser():
    noise = torch.randn(4, 64, 64, generator=generator("white"))

    def neighbours(field):
        return torch.corrcoef(torch.stack([field[..., 1:].flatten(), field[..., :-1].flatten()]))[0, 1].item()

    drawn = [pyramid_noise(noise, 8, discount, generator(0)) for discount in (0.0, 0.3, 0.9)]
    for field in drawn:
        assert field.shape == noise.shape and field.std().item() == pytest.approx(1)
    alike = [neighbours(field) for field in drawn]
    assert alike[0] < alike[1] < 0.2 < alike[2]


def test_the_first_level_of_the_pyramid_has_full_resolution():
    noise = torch.randn(4, 8, 8, generator=generator("white"))
    source = generator(3)
    torch.rand((), generator=source)  # of the scale, whose zeroth power is 1
    whole = noise + torch.randn((4, 8, 8), generator=source)
    assert torch.allclose(pyramid_noise(noise, 1, 0.3, generator(3)), whole / whole.std())
    # 8 / r ** i is below 2 from the third on, so the fourth is the last at the latest
    assert torch.equal(pyramid_noise(noise, 4, 0.3, generator(3)), pyramid_noise(noise, 40, 0.3, generator(3)))


def test_similar_keys_give_unrelated_seeds():
    seeds = {seed_of(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert seed_of(1, 12) != seed_of(11, 2)


def test_an_epoch_shows_every_image_once():
    buckets = [list(range(24))]
    for epoch in range(3):
        batches = [batch_indices(0, epoch * 6 + i, buckets, 4) for i in range(6)]
        assert sorted(i for batch in batches for i in batch) == list(range(24))


def test_epochs_and_seeds_differ_in_order():
    buckets = [list(range(24))]
    epoch = lambda seed, number: [batch_indices(seed, number * 6 + i, buckets, 4) for i in range(6)]  # noqa: E731
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_a_batch_has_one_size_and_a_short_bucket_is_repeated():
    buckets = [[0, 1, 2, 3, 4], [5, 6], [7]]
    assert batches_per_epoch(buckets, 4) == 4
    batches = [batch_indices(0, i, buckets, 4) for i in range(4)]
    for batch in batches:
        assert len(batch) == 4
        assert any(set(batch) <= set(bucket) for bucket in buckets)
    assert {i for batch in batches for i in batch} == set(range(8))


def test_choices_are_uniform_and_independent():
    draws = [sample_randomness(0, step, 0, (1, 1, 1), LOSS, 0.0) for step in range(3000)]
    for key in ("crop", "caption", "order"):
        picked = [choose(vars(d)[key], "abc") for d in draws]
        assert all(abs(picked.count(one) - 1000) < 100 for one in "abc")
    pairs = {(choose(d.crop, "abc"), choose(d.caption, "abc"), choose(d.order, "abc"), d.flip) for d in draws}
    assert len(pairs) == 54, "every crop meets every caption, order and flip"
    assert draws[5].crop == sample_randomness(0, 5, 0, (4, 8, 8), ALL_ON, 0.5).crop
    assert len({d.crop for d in (sample_randomness(0, 5, i, (1, 1, 1), LOSS, 0) for i in range(9))}) == 9


def test_tags_are_shuffled_after_those_that_stay_in_place():
    caption = "A HANA_TOFU, with a hat,winking, waving , in the snow"
    orders = shuffle_caption_tags(caption, 1, 8)
    assert len(set(orders)) == 8 and all(order.startswith("A HANA_TOFU, ") for order in orders)
    phrases = ["A HANA_TOFU", "in the snow", "waving", "winking", "with a hat"]
    assert all(sorted(order.split(", ")) == phrases for order in orders)
    assert {order.split(", ")[0] for order in shuffle_caption_tags(caption, 0, 40)} == set(phrases)
    assert orders == shuffle_caption_tags(caption, 1, 8) != shuffle_caption_tags(caption + "!", 1, 8)
    assert shuffle_caption_tags(caption, 3, 8) == [
        "A HANA_TOFU, with a hat, winking, waving, in the snow",
        "A HANA_TOFU, with a hat, winking, in the snow, waving",
    ]
    assert shuffle_caption_tags("A HANA_TOFU", 1, 8) == shuffle_caption_tags("A HANA_TOFU", 5, 8) == ["A HANA_TOFU"]


def test_an_epoch_shows_an_image_as_often_as_it_is_repeated():
    buckets = [[0, 0, 0, 1, 2]]
    for epoch in range(4):
        seen = [i for batch in range(5) for i in batch_indices(0, epoch * 5 + batch, buckets, 1)]
        assert sorted(seen) == buckets[0]
