"""What settings decide: what resume compares, what a pack shares, what the base's images and the page depend on."""

import json
from copy import deepcopy
from typing import get_args

import pytest

from lora_lab.launch.config import compose
from lora_lab.settings.schema import (
    base_image_settings,
    compare_fingerprints,
    fields_of,
    hash_names,
    shared_by_pack,
    shown_on_page,
    training_fingerprint,
    values_of,
)
from lora_lab.settings.setting import choices_of

CONFIG = compose("stage=train")
VALUES = list(values_of(CONFIG))
FIELDS = dict(fields_of())


def another(key, value):
    """A value that the key may have instead of `value`."""
    choices = choices_of(FIELDS[key]) if key in FIELDS else ()
    if len(choices) > 1:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*value, "another"]
    return "another" if value is None or float not in get_args(getattr(FIELDS.get(key), "annotation", None)) else 1.0


def changed(key):
    """The configuration with another value of `key`, which is not checked: one at a time they may not fit together."""
    config = deepcopy(CONFIG)
    *groups, leaf = key.split(".")
    owner = config
    for name in groups:
        owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    before = owner[leaf] if isinstance(owner, dict) else getattr(owner, leaf)
    if isinstance(owner, dict):
        owner[leaf] = another(key, before)
    else:
        object.__setattr__(owner, leaf, another(key, before))
    return config


def of_base_images(config):
    return base_image_settings(config.model, config.loss, config.memory, config.sampler, config.text)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.key)
def test_a_changed_value_is_told_by_all_that_it_decides_and_by_nothing_else(value):
    other, facts = changed(value.key), value.facts
    saved = json.loads(json.dumps(training_fingerprint(CONFIG)))
    compared = "weights" in facts.decides and not facts.hashed_as and not facts.may_change
    assert set(compare_fingerprints(saved, training_fingerprint(other)).changed) == ({value.key} if compared else set())
    assert (shared_by_pack(other) != shared_by_pack(CONFIG)) == (not facts.per_job)
    of_base = "images" in facts.decides and not facts.hashed_as and not value.key.startswith("stage.")
    assert (of_base_images(other) != of_base_images(CONFIG)) == of_base


def test_an_unchanged_run_equals_its_checkpoint():
    saved = json.loads(json.dumps(training_fingerprint(CONFIG) | {"base": "1", "dataset": "2"}))
    comparison = compare_fingerprints(saved, training_fingerprint(CONFIG) | {"base": "1", "dataset": "2"})
    assert (comparison.changed, comparison.unrecorded) == ({}, [])


def test_what_files_hold_is_compared_by_hashes():
    assert hash_names() == {"base", "dataset", "captions", "prior", "start"}
    current = training_fingerprint(CONFIG)
    assert not {"model.base", "dataset.root", "prior.root", "stage.start_from"} & current.keys()
    assert compare_fingerprints(current | {"base": "1"}, current | {"base": "2"}).changes == "base=1, not 2"
    assert compare_fingerprints(current | {"start": "1"}, current).changed == {"start": ("1", None)}
    assert compare_fingerprints(current, current | {"start": "1"}).changed == {"start": (None, "1")}


def test_the_change_of_a_typed_key_comes_first_and_what_follows_from_it_after():
    current = training_fingerprint(compose("stage=train", "rank=8"))
    said = compare_fingerprints(training_fingerprint(CONFIG), current).changes
    assert said == "rank=16, not 8 (also adapter.r, adapter.lora_alpha)"


def test_a_checkpoint_of_an_older_version_is_compared_in_what_it_has():
    current = training_fingerprint(CONFIG)
    groups = {"adapter": CONFIG.adapter, "optimizer": CONFIG.optimizer, "schedule": vars(CONFIG.schedule)}
    new = {"lr", "rank", "trigger", "model.vae", "model.config", "model.bucket_step", "model.variant"}
    old = {key: value for key, value in current.items() if key.partition(".")[0] not in groups and key not in new}
    old = json.loads(json.dumps(old | groups | {"start": None, "base": "1"}))
    comparison = compare_fingerprints(old, current | {"base": "1"})
    assert comparison.changed == {} and set(comparison.unrecorded) == new
    other = training_fingerprint(compose("stage=train", "adapter.use_rslora=true"))
    assert compare_fingerprints(old, other | {"base": "1"}).changed == {"adapter.use_rslora": (False, True)}


def test_a_dataset_is_compared_by_how_often_its_folders_are_shown():
    one, several = (compose("stage=train", f"dataset.root={root}") for root in ("a", "[a,{root:b,repeats:3}]"))
    assert training_fingerprint(one)["dataset.repeats"] == [1]
    assert training_fingerprint(several)["dataset.repeats"] == [1, 3]


@pytest.mark.parametrize(
    "key",
    ["lr", "rank", "steps", "seed", "trigger", "optimizer", "optimizer.eps", "adapter", "adapter.r", "model", "loss",
     "memory", "memory.capture", "compile", "dataset", "score.seeds", "stage.ema_decay", "stage.train.ema_decay",
     "stage.seeds", "experiment", "targets", "adapter.rank_pattern", "of_an_older_version"],
)  # fmt: skip
def test_the_page_tells_runs_apart_by_what_changes_them(key):
    assert shown_on_page(key)


@pytest.mark.parametrize(
    "key",
    ["name", "resume", "publish", "device", "cache", "tracker", "tracker.kind", "tracker.tags", "stage", "lora",
     "stage.checkpoint_every", "stage.train.keep_checkpoints", "hydra.sweep.dir", "hydra/launcher"],
)  # fmt: skip
def test_the_page_does_not_tell_runs_apart_by_names_and_places(key):
    assert not shown_on_page(key)
