"""stage=img2img: draw the character in place of the subject of each photo."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_lab.adapters.files import (
    prediction_from_metadata,
    resolve_lora,
)
from lora_lab.base.encode import key_of
from lora_lab.base.layers import validate_quantization
from lora_lab.base.load import base_class, layer_shapes, pick_device, token_counter, validate_prediction
from lora_lab.base.locate import locate_model
from lora_lab.captions.captioner import Settings, check_captioner, images_per_call, load_captioner, run_captioner
from lora_lab.captions.refiner import load_refiner
from lora_lab.captions.syntax import prompt_warnings
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.evaluation.resemblance import mean_scores, references_of
from lora_lab.images.dataset import find_photos
from lora_lab.images.pixels import aspect_buckets, fit, nearest_bucket, open_picture
from lora_lab.runs import (
    display_path,
    distinct_names,
    hash_files,
    refuse_used,
    remove_temporary_files,
    save_picture,
    write_atomically,
    write_manifest,
    write_text,
)
from lora_lab.sampling.generate import (
    PhotoRequest,
    check_strength,
    photo_to_request,
)
from lora_lab.sampling.structure import check_conditions, controls_of, masks_of
from lora_lab.settings.schema import Config, Img2img
from lora_lab.shared import Shared
from lora_lab.stages.photo_images import (
    PROMPTS,
    GeneratedImage,
    PhotoImages,
    choose,
    draw,
    json_line,
    load_judge,
    scored,
    sheet_of,
)

CAPTIONS = "captions.jsonl"  # a line for each photo


@dataclass(frozen=True)
class Img2imgResult:
    stage: str
    lora: str | None
    lora_weight: float | None  # None: chosen for each image
    strength: float | None
    pictures: list[GeneratedImage]  # photo by photo, seeds in order, and choices, the best first
    sheet: str  # contact sheet of photos, prompts and images
    resemblance: dict[str, float] | None = None  # these three are an Estimate over the images, None without references
    kept: dict[str, float] | None = None
    character: dict[str, float] | None = None


def img2img(config: Config, folder: Path, shared: Shared | None = None) -> Img2imgResult:
    """Draw every photo of `stage.photo` with every seed into `folder`. Captions and images are written as they come; a
    resumed run makes what is missing. `shared` has the base and the captions of earlier jobs of a sweep.

    Raises InputError, before any model is loaded, for wrong settings, a missing or damaged photo, and a LoRA that is
    missing or was trained on another trigger."""
    stage, shared = config.stage, shared or Shared()
    if not config.resume:
        refuse_used(folder, PROMPTS)
    remove_temporary_files(folder)  # of a killed run
    strength = config.model.strength if stage.strength is None else stage.strength
    check_strength(config.sampler.steps, strength)
    conditioned = stage.mask is not None or {config.structure.kind, config.likeness.kind} != {"off"}
    if conditioned:
        check_conditions(config.structure, config.likeness, config.memory, base_class(config.model), config.model.name)
    paths = find_photos(stage.photo, "stage.photo")
    photos = _open_photos(config, paths)
    lora = _lora(config)
    references = _references(config, lora)
    if stage.prompt:
        for line in prompt_warnings({"stage.prompt": stage.prompt}, config.trigger, token_counter(config.model.base)):
            say(line)
    loss = prediction_from_metadata(config.loss, config.model.base, lora)
    validate_prediction(config.model, loss)
    device = pick_device(config.device)
    validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    auto = _chooses(stage, lora, references)
    if auto:
        check_strength(stage.draft_steps, strength, "stage.draft_steps")
    say(_introduction(config, len(photos), lora, strength, auto, device))
    conditions = _conditions(config, paths, photos, device, folder) if conditioned else [{}] * len(photos)
    photo_requests = _photo_requests(config, paths, photos, device, folder, shared)
    photo_requests = [
        replace(item, request=replace(item.request, strength=strength, **values))
        for item, values in zip(photo_requests, conditions, strict=True)
    ]
    torch.cuda.empty_cache()  # the captioner's memory, for the base
    write_manifest(folder, device, {})
    _save_photos(paths, photo_requests, folder)
    run = PhotoImages(config, paths, photo_requests, loss, lora, device, folder)
    with ExitStack() as stack:
        base = cache(lambda: run.load_base(stack, shared))  # a resumed run may have all images
        judge = load_judge(run, references, base) if references else None
        specs, drafts = run.usual_specs(strength), {}
        if auto:
            specs, drafts = choose(run, judge, base, strength)
        images = draw(run, specs, drafts, base)
        if judge:
            images = scored(images, judge, paths, base())
    write_text(folder / PROMPTS, "".join(json_line(asdict(image)) for image in images))
    sheet = sheet_of(images, photo_requests)
    write_atomically(folder / "sheet.png", sheet.save)
    place = display_path(folder)
    means = _mean_scores(images)
    if means:
        say(", ".join(f"{name} {mean['value']:.2f}" for name, mean in means.items()) + f" of {len(images)} images")
    say(f"{len(images)} drawn in {place}, side by side in {place / 'sheet.png'}")
    weight = None if auto else stage.usual_weight if lora else 0.0
    return Img2imgResult(
        "img2img", lora and str(lora), weight, None if auto else strength, images, str(folder / "sheet.png"), **means
    )


def _lora(config: Config) -> Path | None:
    """The LoRA file to attach; its trigger may differ from `trigger` if the user gives the prompt."""
    if not config.stage.usual_weight:
        return None
    if config.lora is None:
        raise InputError("lora is missing: use lora=FILE, lora=NAME of models/lora, or lora=RUN FOLDER")
    if isinstance(config.lora, list):
        raise InputError(f"lora={config.lora}: stage=img2img draws with one LoRA, name one")
    return resolve_lora(str(config.lora), None if config.stage.prompt else config.trigger, layer_shapes(config.model))


def _references(config: Config, lora: Path | None) -> list[Path]:
    """The LoRA's training images, [] if they are not known, which is printed. Raises InputError for a missing folder,
    and if stage.auto needs the images."""
    stage = config.stage
    if lora is None or not stage.resemblance:
        return []
    references = references_of(lora, config.dataset)
    if not references:
        what = f"the training images of {lora.name} are not known, set dataset.root to their folder"
        if stage.auto:
            raise InputError(f"stage.auto=true compares drafts with the character: {what}")
        say(f"{what} to have weight and strength chosen and the images scored")
        return []
    check_captioner(config.captioner)
    if config.model.dino:
        locate_model("model.dino", config.model.dino)
    return references


def _chooses(stage: Img2img, lora: Path | None, references: Sequence[Path]) -> bool:
    """Whether weight and strength are chosen for each image."""
    if stage.auto is not None:
        return stage.auto and lora is not None
    return bool(references) and stage.lora_weight is None and stage.strength is None


def _introduction(
    config: Config, photos: int, lora: Path | None, strength: float, auto: bool, device: torch.device
) -> str:
    stage = config.stage
    attached = f"{lora} at {stage.usual_weight:g}" if lora else "no LoRA"
    how = f"strength {strength:g}, {attached}"
    if auto:
        given = "strength" if stage.lora_weight is not None else "weight" if stage.strength is not None else "both"
        chosen = "weight and strength" if given == "both" else given
        how = f"{lora}, {chosen} chosen from {stage.budget} drafts of {stage.draft_steps} steps"
    return f"{photos} photos, {how}, {config.model.base} on {device}"


def _open_photos(config: Config, paths: Sequence[Path]) -> list[Image.Image]:
    """The photos, cut to their buckets: a folder of large ones would not fit into memory. Raises InputError."""
    buckets = aspect_buckets(config.model.resolution, config.model.bucket_step)
    photos = []
    for path in paths:
        photo = open_picture(path)
        photos.append(fit(photo, nearest_bucket(photo.size, buckets)).picture)
    return photos


def _photo_requests(
    config: Config,
    paths: Sequence[Path],
    photos: Sequence[Image.Image],
    device: torch.device,
    folder: Path,
    shared: Shared,
) -> list[PhotoRequest]:
    """The request of each photo with seed 0."""
    stage, captions = config.stage, [None] * len(paths)
    buckets = aspect_buckets(config.model.resolution, config.model.bucket_step)
    refiner = load_refiner(config.refiner)
    if not stage.prompt:
        check_captioner(config.captioner)
        captions = _captions(config.captioner, paths, device, folder / CAPTIONS, shared)
    return [
        photo_to_request(photo, text, refiner, config.trigger, buckets, prompt=stage.prompt)
        for photo, text in zip(photos, captions, strict=True)
    ]


def _conditions(
    config: Config, paths: Sequence[Path], photos: Sequence[Image.Image], device: torch.device, folder: Path
) -> list[dict[str, Any]]:
    """For each photo what its request has beside prompt and photo: control, likeness and mask. Control images and masks
    are also saved to structure/ and mask/ of `folder`. Raises InputError."""
    stage, structure, likeness = config.stage, config.structure, config.likeness
    parts = [f"structure={structure.kind} weighs {structure.scale:g} in {structure.end:.0%} of the steps"]
    parts += [f"likeness={likeness.kind} weighs {likeness.scale:g}", f"only stage.mask={stage.mask} is drawn"]
    used = (structure.kind != "off", likeness.kind != "off", stage.mask is not None)
    say("; ".join(part for part, is_used in zip(parts, used, strict=True) if is_used))
    controls = controls_of(config.structure, paths, photos, device)
    masks = masks_of(stage.mask, stage.feather, config.model.segmenter, paths, photos, device)
    for name, control, mask in zip(distinct_names(paths), controls, masks, strict=True):
        for part, image in (("structure", control and control.image), ("mask", mask)):
            if image:
                save_picture(folder / part / f"{name}.png", image, {})
    likenesses = photos if config.likeness.kind != "off" else [None] * len(photos)
    keys = ("control", "likeness", "mask")
    return [dict(zip(keys, values, strict=True)) for values in zip(controls, likenesses, masks, strict=True)]


def _captions(settings: Settings, paths: Sequence[Path], device: torch.device, file: Path, shared: Shared) -> list[str]:
    """The captioner's caption of each photo, whole and not cut to its bucket.

    It is appended to `file` at once, by a hash of all that decides it, and taken from there by a resumed run, or from
    an earlier job of a sweep. The captioner is loaded only if one is missing, and gets the same photos together in any
    case."""
    size, captioner, captions = images_per_call(settings), None, []
    keys = [key_of(hash_files(path), dict(settings)) for path in paths]
    batches = [(keys[start : start + size], paths[start : start + size]) for start in range(0, len(paths), size)]
    known = {row["key"]: row["caption"] for row in _rows(file)}
    known = {key: known[key] for batch, _ in batches if known.keys() >= {*batch} for key in batch}
    write_text(file, "".join(map(_caption_line, known.items())))
    with file.open("a", encoding="utf-8") as stream:
        for batch, photos in batches:
            if not known.keys() >= {*batch}:
                together = (str(device), *batch)
                if together not in shared.captions:
                    captioner = captioner or load_captioner(settings, device)
                    shared.captions[together] = run_captioner(captioner, [open_picture(path) for path in photos])
                known |= zip(batch, shared.captions[together], strict=True)
                stream.write("".join(_caption_line((key, known[key])) for key in dict.fromkeys(batch)))
                stream.flush()
            captions += [known[key] for key in batch]
    return captions


def _caption_line(item: tuple[str, str]) -> str:
    return json_line({"key": item[0], "caption": item[1]})


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON lines, {} without one; a line that was cut off by a kill is left out."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with suppress(ValueError):
            yield json.loads(line)


def _save_photos(paths: Sequence[Path], photo_requests: Sequence[PhotoRequest], folder: Path) -> None:
    """Save each photo as it is drawn over, for the comparison page of a sweep, as photos/NAME.png of `folder`."""
    for name, item in zip(distinct_names(paths), photo_requests, strict=True):
        write_atomically(folder / "photos" / f"{name}.png", item.request.photo.save, durable=False)


def _mean_scores(images: Sequence[GeneratedImage]) -> dict[str, dict[str, float]]:
    """The means over the images; {} without scores."""
    scores = [image.scores for image in images if image.scores]
    return {name: asdict(mean) for name, mean in mean_scores(scores).items()} if scores else {}
