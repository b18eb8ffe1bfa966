"""Score LoRA files, of any trainer, by the images they render: fidelity to character and prompt, and leakage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from lora_lab.adapters.files import (
    embeddings_path,
    prediction_from_metadata,
    read_tokens,
    resolve_lora,
    text_from_metadata,
    triggers_of,
)
from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Encoder, key_of
from lora_lab.base.layers import validate_quantization
from lora_lab.base.load import layer_shapes, pick_device, pick_dtype, token_counter, validate_prediction
from lora_lab.base.locate import hash_model, locate_folder, locate_model
from lora_lab.captions.syntax import prompt_warnings, prompts_by_key
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.evaluation.ladder import WHOLE, Ladder, write_ladder
from lora_lab.evaluation.metrics import Scores
from lora_lab.evaluation.scores import (
    Pictures,
    ScoredImages,
    ScorePrompts,
    Scorers,
    held_out_pictures,
    load_scored,
    open_pictures,
    save_scored,
    table,
    validate_embedders,
    write_lines,
)
from lora_lab.images.dataset import folder_prefix
from lora_lab.images.scan import find_pictures
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import (
    display_path,
    distinct_names,
    hash_files,
    refuse_used,
    write_atomically,
    write_manifest,
)
from lora_lab.sampling.generate import RenderSettings, base_for_sampling, find_photos, render_settings
from lora_lab.settings.schema import Config, Loss, Text, values_of
from lora_lab.shared import Shared

CELL = 256  # px, of the sheet


@dataclass(frozen=True)
class Evaluated:
    """The scores of one LoRA file."""

    lora: str
    scores: Scores
    samples: str  # the folder of the LoRA's images


@dataclass(frozen=True)
class EvaluateResult:
    """result.json of stage=evaluate."""

    stage: str
    trigger: str  # of several characters all of them
    scores_before: Scores  # of the base without a LoRA
    loras: list[Evaluated]  # in the order they were named; with stage.ladder each is followed by its damaged copies
    ladders: list[Ladder]  # one for each named file with stage.ladder
    lines: str  # scores.jsonl: the scores of every image
    sheet: str  # the base's images and every LoRA's side by side


def evaluate(config: Config, folder: Path, shared: Shared | None = None) -> EvaluateResult:
    """Score every file of `config.lora` into `folder`; with `config.resume`, those that are not scored there yet.
    `shared` has the base of earlier jobs of a sweep.

    Raises InputError before any model is loaded, and after that only for a file whose layers turn out not to be those
    of the base."""
    if not config.resume:
        refuse_used(folder, "scores.jsonl")
    if config.model.judge is None:
        raise InputError("model.judge=null: scores need a CLIP, set model.judge= to one")
    base = locate_model("model.base", config.model.base)
    named = _loras(config)
    config = replace(config, text=_text(config, named))
    loss = _loss(config, named)
    validate_embedders(config.model, config.score, config.captioner)
    device = pick_device(config.device)
    dtype = pick_dtype(config.model.precision, device)
    validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    hashes = {"base": hash_model(base)}
    scorers = _load_scorers(config, named, hashes, device, folder)
    ladders = _write_ladders(named, folder) if config.stage.ladder else {}
    loras = [file for lora in named for file in (lora, *ladders.get(lora, {}).values())]
    render = render_settings(
        config.model, loss, config.memory, config.sampler, config.text, config.cache, hashes["base"], dtype
    )
    with base_for_sampling(shared or Shared(), config.model, config.memory, loss, config.text, device) as encoder:
        for lora in loras:  # before the first is worked on: that they can be read and have the right shapes is known
            with lora_attached(encoder.base, lora):
                pass
        scored = _score_all(config, loras, scorers, render, encoder, folder)
    values = {lora: images.scores["score"].value for lora, images in zip(loras, scored[1:], strict=True)}
    judged = [
        Ladder.of(str(lora), {WHOLE: values[lora]} | {name: values[copy] for name, copy in copies.items()})
        for lora, copies in ladders.items()
    ]
    lines, sheet = folder / "scores.jsonl", _sheet(scored, folder / "sheet.png")
    say(f"\n{table(scored)}\n\npictures side by side in {display_path(sheet)}, one by one in {display_path(lines)}")
    for ladder in judged:
        say(ladder.describe())
    return EvaluateResult(
        stage="evaluate",
        trigger=config.triggers.phrase,
        scores_before=scored[0].scores,
        loras=[
            Evaluated(str(lora), images.scores, str(place))
            for lora, images, place in zip(loras, scored[1:], _places(folder, loras), strict=True)
        ],
        ladders=judged,
        lines=str(lines),
        sheet=str(sheet),
    )


def _write_ladders(loras: list[Path], folder: Path) -> dict[Path, dict[str, Path]]:
    """The damaged copies of each LoRA by name."""
    names = distinct_names(loras)
    return {lora: write_ladder(lora, folder / "ladder", name) for lora, name in zip(loras, names, strict=True)}


def _load_scorers(
    config: Config, loras: Sequence[Path], hashes: dict[str, str], device: torch.device, folder: Path
) -> Scorers:
    """Say what is compared with what, after the last check of the inputs, and embed the images.

    All but the references are in memory only here. Raises InputError for images that cannot be opened."""
    training = _training_pictures(config, loras)
    held_out = held_out_pictures(config.model, config.score, config.triggers)
    count = sum(map(len, (held_out or training).values()))
    references = f"{count} {'held-out' if held_out else 'training'} pictures"
    texts = prompts_by_key(score_prompts=config.score.prompts, score_other_prompts=config.score.other_prompts)
    count_tokens = token_counter(config.model.base)
    for line in prompt_warnings(texts, config.triggers, count_tokens, config.text.window, of_character=False):
        say(line)
    images = sum(len(ScorePrompts.of(config.score, trigger, config.class_noun).specs) for trigger in training)
    say(
        f"{len(loras)} LoRA of {config.triggers.phrase}, {images} pictures each, compared with {references}, "
        f"{config.model.base} on {device}"
    )
    write_manifest(folder, device, hashes)
    return Scorers.load(
        config.score,
        config.model,
        config.captioner,
        config.refiner,
        config.class_noun,
        training,
        held_out,
        device,
    )


def _loras(config: Config) -> list[Path]:
    values = config.lora if isinstance(config.lora, list) else [config.lora]
    if not values or None in values:
        raise InputError("lora is missing: set lora=FILE, lora=NAME of models/lora, lora=RUN FOLDER, or lora=[A,B]")
    layers = layer_shapes(config.model)
    return [resolve_lora(str(value), config.triggers.all, layers) for value in values]


def _text(config: Config, loras: list[Path]) -> Text:
    """`config.text` with the limit of tokens that the files were trained with. Raises InputError where that of two
    files differs."""
    first, *others = [text_from_metadata(config.text, lora) for lora in loras]
    for lora, text in zip(loras[1:], others, strict=True):
        if text.window != first.window:
            raise InputError(
                f"{loras[0].name} was trained with text.max_tokens={first.max_tokens or 77}, {lora.name} with "
                f"{text.max_tokens or 77}: score them separately, or set text.max_tokens="
            )
    return first


def _loss(config: Config, loras: list[Path]) -> Loss:
    """`config.loss` with the prediction that the files state; one that does not state it has that of the base.

    Raises InputError where the predictions of two files are known and differ."""
    known: dict[str, tuple[Path, Any]] = {}  # what is known of a key of loss, and of which file
    own, merged = validate_prediction(config.model, config.loss), config.loss
    for lora in loras:
        stated = prediction_from_metadata(config.loss, config.model.base, lora)
        stated = validate_prediction(config.model, stated)
        for key in ("prediction", "zero_terminal_snr"):
            value = getattr(stated, key)
            if value in ("auto", None):
                continue
            first, before = known.setdefault(key, (lora, value))
            if before != value:
                raise InputError(
                    f"loss.{key} is {before} for {first.name} and {value} for {lora.name}, by their metadata or else "
                    "the base's: score them separately"
                )
            merged = replace(merged, **{key: value})
    # Without a difference the key of the base's cached images stays that of a training with these settings.
    return config.loss if merged == own else merged


def _places(folder: Path, loras: list[Path]) -> list[Path]:
    """The folder of each LoRA's images."""
    return [folder / "samples" / name for name in distinct_names(loras)]


def _score_all(
    config: Config, loras: list[Path], scorers: Scorers, render: RenderSettings, encoder: Encoder, folder: Path
) -> list[ScoredImages]:
    """The scores of the base and of every LoRA, with thumbnails as pictures. Each is written as soon as it is known;
    what the folder has already, of the same files and settings, is not done again."""
    before = scorers.score_base(render, folder, encoder)
    scored = [replace(before, pictures=_thumbnails(before))]
    write_lines(folder, scored)
    inputs = _inputs(config, render)
    try:
        for lora, place in zip(loras, _places(folder, loras), strict=True):
            embeddings = [embeddings_path(lora)] if read_tokens(lora) else []
            key = key_of("scored", hash_files(lora, *embeddings), lora.stem, inputs)
            images = load_scored(place, lora, key) if config.resume else None
            if images:
                say(f"{lora.name} is scored already")
            else:
                images = scorers.score(lora, render, place, encoder)
                save_scored(place, images, key)
            scored.append(
                replace(images, pictures=_thumbnails(images))
            )  # of many LoRA files, whole images fill the memory
            write_lines(folder, scored)
    except (Exception, KeyboardInterrupt):
        say(f"{len(scored) - 1} of {len(loras)} LoRA are scored, the others will be with resume={display_path(folder)}")
        raise
    return scored


def _thumbnails(images: ScoredImages) -> list[Image.Image]:
    """The pictures as the sheet shows them."""
    return [ImageOps.contain(picture, (CELL, CELL), Image.Resampling.LANCZOS) for picture in images.pictures]


def _inputs(config: Config, render: RenderSettings) -> tuple[object, ...]:
    """All that decides the scores of a LoRA, but for the LoRA itself."""
    settings = {v.key: v.value for v in values_of(config) if {"images", "request"} & {*v.facts.decides}}
    roots = [locate_folder("dataset.root", f.root) for f in config.dataset.folders]
    if config.score.held_out:
        roots.append(locate_folder("score.held_out", config.score.held_out))
    images = [hash_files(*find_pictures(root, "dataset.root").values()) for root in roots]
    if config.score.photos is not None:
        images.append(hash_files(*find_photos(config.score.photos, "score.photos")))
    return (
        render.base_key,
        render.side,
        sorted((settings | {"lora": None, "stage.ladder": None}).items(), key=itemgetter(0)),
        images,
    )


def _training_pictures(config: Config, loras: Sequence[Path]) -> Pictures:
    """The images of dataset.root of each character. Of a file with several characters, if one is scored, those in the
    folder that the file names, if dataset.root has it. Raises InputError."""
    roots = [locate_folder("dataset.root", folder.root) for folder in config.dataset.folders]
    follow_links, triggers = config.dataset.follow_links, config.triggers
    files = {
        folder_prefix(root, roots) + name: path
        for root in roots
        for name, path in find_pictures(root, "dataset.root", follow_links).items()
    }
    several = [found for lora in loras if (found := triggers_of(lora)) and found.all[1:]]
    if several and not triggers.all[1:]:
        files = {name: files[name] for name in several[0].own(files, config.character)}
    return open_pictures(files, triggers, config.model)


def _sheet(scored: list[ScoredImages], path: Path) -> Path:
    """A row for each prompt and seed, a column for the base and for each LoRA."""
    pictures = zip(*(images.pictures for images in scored), strict=True)
    rows = [
        [f"{line['prompt']} (seed {line['seed']})", *row] for line, row in zip(scored[0].lines, pictures, strict=True)
    ]
    sheet = contact_sheet(rows, ["prompt", *(images.name for images in scored)], cell=CELL)
    return write_atomically(path, sheet.save)
