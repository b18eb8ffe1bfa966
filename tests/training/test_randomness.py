import torch

from lora_lab.training.randomness import batches_per_epoch, draw, pick, seed_of


def test_a_draw_depends_on_seed_step_and_sample_alone():
    first = draw(0, 5, 2, (4, 8, 8), 1000, 0.1)
    torch.rand(100)  # whatever else draws in between
    again = draw(0, 5, 2, (4, 8, 8), 1000, 0.1)
    assert first.timestep == again.timestep and torch.equal(first.noise, again.noise)
    assert (first.flip, first.drop_caption) == (again.flip, again.drop_caption)
    for other in (
        draw(1, 5, 2, (4, 8, 8), 1000, 0.1),
        draw(0, 6, 2, (4, 8, 8), 1000, 0.1),
        draw(0, 5, 3, (4, 8, 8), 1000, 0.1),
    ):
        assert not torch.equal(first.noise, other.noise)


def test_timesteps_and_coins_are_uniform():
    draws = [draw(0, step, 0, (1,), 1000, 0.25) for step in range(2000)]
    timesteps = torch.tensor([d.timestep for d in draws], dtype=torch.float64)
    assert timesteps.min() < 10 and timesteps.max() > 989
    assert abs(timesteps.mean().item() - 499.5) < 20  # three standard errors
    assert abs(sum(d.drop_caption for d in draws) / 2000 - 0.25) < 0.03
    assert abs(sum(d.flip for d in draws) / 2000 - 0.5) < 0.035


def test_near_keys_give_unrelated_seeds():
    seeds = {seed_of(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert seed_of(1, 12) != seed_of(11, 2)


def test_an_epoch_shows_every_picture_once():
    buckets = [list(range(24))]
    for epoch in range(3):
        batches = [pick(0, epoch * 6 + i, buckets, 4) for i in range(6)]
        assert sorted(i for batch in batches for i in batch) == list(range(24))


def test_epochs_and_seeds_differ_in_order():
    buckets = [list(range(24))]
    epoch = lambda seed, number: [pick(seed, number * 6 + i, buckets, 4) for i in range(6)]  # noqa: E731
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_a_batch_holds_one_size_and_a_short_bucket_is_filled_from_itself():
    buckets = [[0, 1, 2, 3, 4], [5, 6], [7]]
    assert batches_per_epoch(buckets, 4) == 4
    batches = [pick(0, i, buckets, 4) for i in range(4)]
    for batch in batches:
        assert len(batch) == 4
        assert any(set(batch) <= set(bucket) for bucket in buckets)
    assert {i for batch in batches for i in batch} == set(range(8))
