"""stage=img2img: draw the character in place of the subject of each photo."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from lora_lab.adapters.files import prediction_from_metadata, resolve_lora
from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Encoder
from lora_lab.base.layers import validate_quantization
from lora_lab.base.load import layer_shapes, pick_device, validate_prediction
from lora_lab.base.locate import locate_folder
from lora_lab.captions.captioner import check_captioner, load_captioner
from lora_lab.captions.refiner import load_refiner
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.images.pixels import aspect_buckets, open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import distinct_names, refuse_used, save_picture, write_atomically, write_manifest, write_text
from lora_lab.sampling.generate import PhotoRequest, check_strength, generate, load_base_for_sampling, photo_to_request
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class GeneratedImage:
    photo: str  # path
    caption: str | None  # the captioner's caption of the photo; None with stage.prompt
    prompt: str
    seed: int
    picture: str  # path


@dataclass(frozen=True)
class Img2imgResult:
    stage: str
    lora: str | None
    strength: float
    pictures: list[GeneratedImage]  # photo by photo, seeds in order
    sheet: str  # contact sheet of photos, prompts and images


def img2img(config: Config, folder: Path) -> Img2imgResult:
    """Draw every photo of `stage.photo` with every seed into `folder`.

    Raises InputError, before any model is loaded, for wrong settings, a missing or damaged photo, and a LoRA that is
    missing or was trained on another trigger."""
    stage = config.stage
    if not config.resume:
        refuse_used(folder, "prompts.jsonl")
    check_strength(config.sampler.steps, stage.strength)
    paths = find_photos(stage.photo)
    photos = [open_picture(path) for path in paths]
    lora = _lora(config)
    loss = prediction_from_metadata(config.loss, config.model.base, lora)
    validate_prediction(config.model, loss)
    device = pick_device(config.device)
    validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    attached = f"{lora} at {stage.lora_weight:g}" if lora else "no LoRA"
    say(f"{len(photos)} photos, strength {stage.strength:g}, {attached}, {config.model.base} on {device}")
    photo_requests = _photo_requests(config, photos, device)
    torch.cuda.empty_cache()  # the captioner's memory, for the base
    write_manifest(folder, device, {})
    encoder = load_base_for_sampling(config.model, config.memory, loss, device)
    images = list(_draw(config, paths, photo_requests, lora, encoder, folder))
    rows = "".join(json.dumps(asdict(image), ensure_ascii=False) + "\n" for image in images)
    write_text(folder / "prompts.jsonl", rows)
    sheet = _sheet(images, photo_requests, stage.seeds)
    write_atomically(folder / "sheet.png", sheet.save)
    say(f"{len(images)} drawn in {folder}, side by side in {folder / 'sheet.png'}")
    return Img2imgResult("img2img", lora and str(lora), stage.strength, images, str(folder / "sheet.png"))


def find_photos(value: object) -> list[Path]:
    """The image files of `stage.photo`: an image, a folder of images, or a list of either.

    Raises InputError for anything else, for a path that does not exist, and for a folder without images."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str) for item in values):
        raise InputError(f"stage.photo={value}: name a picture, a folder of pictures, or a list: [me.jpg,you.png]")
    files: list[Path] = []
    for item in values:
        path = locate_folder("stage.photo", item)
        files += find_pictures(path, "stage.photo").values() if path.is_dir() else [path]
    return files


def _lora(config: Config) -> Path | None:
    """The LoRA file to attach; its trigger may differ from `trigger` if the user gives the prompt."""
    if not config.stage.lora_weight:
        return None
    if config.lora is None:
        raise InputError("lora is missing: use lora=FILE, lora=NAME of models/lora, or lora=RUN FOLDER")
    if isinstance(config.lora, list):
        raise InputError(f"lora={config.lora}: stage=img2img draws with one LoRA, name one")
    return resolve_lora(str(config.lora), None if config.stage.prompt else config.trigger, layer_shapes(config.model))


def _photo_requests(config: Config, photos: Sequence[Image.Image], device: torch.device) -> list[PhotoRequest]:
    """The request of each photo with seed 0; the captioner is loaded only while it writes captions."""
    stage, captioner = config.stage, None
    buckets = aspect_buckets(config.model.resolution, config.model.bucket_step)
    refiner = load_refiner(config.refiner)
    if not stage.prompt:
        check_captioner(config.captioner)
        captioner = load_captioner(config.captioner, device)
    return [
        photo_to_request(
            photo, captioner, refiner, config.trigger, buckets, prompt=stage.prompt, strength=stage.strength
        )
        for photo in photos
    ]


def _draw(
    config: Config,
    paths: Sequence[Path],
    photo_requests: Sequence[PhotoRequest],
    lora: Path | None,
    encoder: Encoder,
    folder: Path,
) -> Iterator[GeneratedImage]:
    """Draw each request with each seed and save each image at once, so that Ctrl-C loses only what is not drawn yet."""
    stage, lora_name = config.stage, lora and lora.name
    jobs = [
        (path, name, item.caption, replace(item.request, seed=seed))
        for path, name, item in zip(paths, distinct_names(paths), photo_requests, strict=True)
        for seed in stage.seeds
    ]
    with lora_attached(encoder.base, lora, stage.lora_weight, config.sampler.fuse):
        images = generate(encoder.base, [request for *_, request in jobs], config.sampler, encoder)
        for (path, name, caption, request), image in zip(jobs, images, strict=True):
            file = folder / f"{name}-s{request.seed}.png"
            metadata = {
                "prompt": request.prompt, "seed": request.seed, "strength": stage.strength, "lora": lora_name,
            }  # fmt: skip
            save_picture(file, image, metadata)
            yield GeneratedImage(str(path), caption, request.prompt, request.seed, str(file))


def _sheet(
    images: Sequence[GeneratedImage], photo_requests: Sequence[PhotoRequest], seeds: Sequence[int]
) -> Image.Image:
    """A row for each photo: the photo, its prompt, and its image of each seed."""
    rows = []
    for i, item in enumerate(photo_requests):
        row = images[i * len(seeds) : (i + 1) * len(seeds)]
        rows.append([item.request.photo, item.request.prompt, *(open_picture(Path(image.picture)) for image in row)])
    return contact_sheet(rows, ["photo", "prompt", *(f"seed {seed}" for seed in seeds)])
