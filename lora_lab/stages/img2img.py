"""stage=img2img: draw the character in place of the subject of each photo."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_lab.adapters.files import embeddings_path, prediction_from_metadata, read_tokens, resolve_lora
from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Encoder, key_of
from lora_lab.base.layers import validate_quantization
from lora_lab.base.load import base_class, layer_shapes, pick_device, pick_dtype, token_counter, validate_prediction
from lora_lab.base.locate import hash_model, locate_folder, locate_model
from lora_lab.base.protocol import PhotoConditioned
from lora_lab.captions.captioner import Settings, check_captioner, images_per_call, load_captioner, run_captioner
from lora_lab.captions.refiner import load_refiner
from lora_lab.captions.syntax import prompt_warnings
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.images.dataset import say_unused
from lora_lab.images.pixels import aspect_buckets, fit, nearest_bucket, open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.images.sheet import contact_sheet
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
    Request,
    base_for_sampling,
    batches_of,
    check_strength,
    generate,
    photo_to_request,
    render_settings,
)
from lora_lab.sampling.structure import check_conditions, controls_of, masks_of
from lora_lab.settings.schema import Config, Loss, Sampler
from lora_lab.shared import Shared

PROMPTS, CAPTIONS = "prompts.jsonl", "captions.jsonl"  # a line for each image; for each photo


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


@dataclass(frozen=True)
class _Job:
    image: GeneratedImage
    request: Request
    key: str  # a hash of all that decides the pixels

    def is_drawn(self) -> bool:
        """Whether the image file is there and was drawn from the same inputs with the same settings."""
        try:
            with Image.open(self.image.picture, formats=["PNG"]) as file:
                return file.text.get("key") == self.key
        except (OSError, SyntaxError, ValueError):
            return False


def img2img(config: Config, folder: Path, shared: Shared | None = None) -> Img2imgResult:
    """Draw every photo of `stage.photo` with every seed into `folder`. Captions and images are written as they come; a
    resumed run makes what is missing. `shared` has the base and the captions of earlier jobs of a sweep.

    Raises InputError, before any model is loaded, for wrong settings, a missing or damaged photo, and a LoRA that is
    missing or was trained on another trigger."""
    stage, shared = config.stage, shared or Shared()
    if not config.resume:
        refuse_used(folder, PROMPTS)
    remove_temporary_files(folder)  # of a killed run
    check_strength(config.sampler.steps, stage.strength)
    conditioned = stage.mask is not None or {config.structure.kind, config.likeness.kind} != {"off"}
    if conditioned:
        check_conditions(config.structure, config.likeness, config.memory, base_class(config.model), config.model.name)
    paths = find_photos(stage.photo)
    photos = _open_photos(config, paths)
    lora = _lora(config)
    if stage.prompt:
        for line in prompt_warnings({"stage.prompt": stage.prompt}, config.trigger, token_counter(config.model.base)):
            say(line)
    loss = prediction_from_metadata(config.loss, config.model.base, lora)
    validate_prediction(config.model, loss)
    device = pick_device(config.device)
    validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    attached = f"{lora} at {stage.lora_weight:g}" if lora else "no LoRA"
    say(f"{len(photos)} photos, strength {stage.strength:g}, {attached}, {config.model.base} on {device}")
    conditions = _conditions(config, paths, photos, device, folder) if conditioned else [{}] * len(photos)
    photo_requests = _photo_requests(config, paths, photos, device, folder, shared)
    photo_requests = [
        replace(item, request=replace(item.request, **values))
        for item, values in zip(photo_requests, conditions, strict=True)
    ]
    torch.cuda.empty_cache()  # the captioner's memory, for the base
    write_manifest(folder, device, {})
    _save_photos(paths, photo_requests, folder)
    jobs = _jobs(config, paths, photo_requests, _key(config, loss, lora, device), folder)
    _draw(config, jobs, loss, lora, device, folder, shared)
    images = [job.image for job in jobs]
    sheet = _sheet(images, photo_requests, stage.seeds)
    write_atomically(folder / "sheet.png", sheet.save)
    place = display_path(folder)
    say(f"{len(images)} drawn in {place}, side by side in {place / 'sheet.png'}")
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
        if path.is_dir():
            say_unused([path])
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
        photo_to_request(photo, text, refiner, config.trigger, buckets, prompt=stage.prompt, strength=stage.strength)
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
    return _line({"key": item[0], "caption": item[1]})


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON lines, {} without one; a line that was cut off by a kill is left out."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with suppress(ValueError):
            yield json.loads(line)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _save_photos(paths: Sequence[Path], photo_requests: Sequence[PhotoRequest], folder: Path) -> None:
    """Save each photo as it is drawn over, for the comparison page of a sweep, as photos/NAME.png of `folder`."""
    for name, item in zip(distinct_names(paths), photo_requests, strict=True):
        write_atomically(folder / "photos" / f"{name}.png", item.request.photo.save, durable=False)


def _key(config: Config, loss: Loss, lora: Path | None, device: torch.device) -> str:
    """A hash of what decides the pixels of all images alike: base, LoRA, sampler."""
    base = hash_model(locate_model("model.base", config.model.base))
    dtype = pick_dtype(config.model.precision, device)
    render = render_settings(config.model, loss, config.memory, config.sampler, None, base, dtype)
    files = [lora, *([embeddings_path(lora)] if read_tokens(lora) else [])] if lora else []
    models = {"structure.controlnet": config.structure.controlnet, "likeness.adapter": config.likeness.adapter}
    conditions = [hash_model(locate_model(key, name)) for key, name in models.items() if name]
    likeness = config.likeness
    conditions += [likeness.weights, likeness.encoder, likeness.scale] if likeness.kind != "off" else []
    return key_of(render.base_key, hash_files(*files), config.stage.lora_weight, *conditions)


def _jobs(
    config: Config, paths: Sequence[Path], photo_requests: Sequence[PhotoRequest], key: str, folder: Path
) -> list[_Job]:
    """What is to be drawn, photo by photo, seeds in order."""
    jobs = []
    for path, name, item in zip(paths, distinct_names(paths), photo_requests, strict=True):
        photo = hash_files(path)
        for seed in config.stage.seeds:
            request = replace(item.request, seed=seed)
            file = str(folder / f"{name}-s{seed}.png")
            image = GeneratedImage(str(path), item.caption, request.prompt, seed, file)
            conditions = _key_of_conditions(request)
            parts = (photo, request.prompt, seed, request.size, request.strength, *conditions)
            jobs.append(_Job(image, request, key_of(key, *parts)))
    return jobs


def _key_of_conditions(request: Request) -> list[object]:
    """What decides a request's control and mask."""
    control, mask = request.control, request.mask
    numbers = [control.scale, control.end] if control else []
    images = [control.image] if control else []
    return [*numbers, *(key_of(image.tobytes()) for image in (*images, *([mask] if mask else [])))]


def _draw(
    config: Config,
    jobs: Sequence[_Job],
    loss: Loss,
    lora: Path | None,
    device: torch.device,
    folder: Path,
    shared: Shared,
) -> None:
    """Draw the jobs that are not drawn yet and save each image, and its line in prompts.jsonl, at once.

    Images of one batch depend on each other, so a batch is drawn whole or not at all."""
    waiting, lora_name, file = iter(jobs), lora and lora.name, folder / PROMPTS
    batches = [
        [next(waiting) for _ in batch] for batch in batches_of([job.request for job in jobs], config.sampler.batch_size)
    ]
    by_state = groupby(batches, lambda batch: all(job.is_drawn() for job in batch))
    parts = [(drawn, list(chain.from_iterable(part))) for drawn, part in by_state]
    write_text(file, "".join(_line(asdict(job.image)) for drawn, part in parts if drawn for job in part))
    if not all(drawn for drawn, _ in parts):
        with ExitStack() as stack:
            encoder = stack.enter_context(base_for_sampling(shared, config.model, config.memory, loss, device))
            if isinstance(encoder.base, PhotoConditioned):
                encoder.base.load_control(config.structure, device, config.memory.offload)
                encoder.base.load_likeness(config.likeness, device)
            stack.enter_context(lora_attached(encoder.base, lora, config.stage.lora_weight, config.sampler.fuse))
            stream = stack.enter_context(file.open("a", encoding="utf-8"))
            missing = (_drawn(part, config.sampler, encoder) for drawn, part in parts if not drawn)
            for job, picture in chain.from_iterable(missing):
                metadata = {
                    "prompt": job.request.prompt, "seed": job.request.seed, "strength": job.request.strength,
                    "lora": lora_name, "key": job.key,
                }  # fmt: skip
                save_picture(Path(job.image.picture), picture, metadata)
                stream.write(_line(asdict(job.image)))
                stream.flush()
    write_text(file, "".join(_line(asdict(job.image)) for job in jobs))  # in order


def _drawn(jobs: Sequence[_Job], sampler: Sampler, encoder: Encoder) -> Iterable[tuple[_Job, Image.Image]]:
    return zip(jobs, generate(encoder.base, [job.request for job in jobs], sampler, encoder), strict=True)


def _sheet(
    images: Sequence[GeneratedImage], photo_requests: Sequence[PhotoRequest], seeds: Sequence[int]
) -> Image.Image:
    """A row for each photo: the photo, its prompt, and its image of each seed."""
    rows = []
    for i, item in enumerate(photo_requests):
        row = images[i * len(seeds) : (i + 1) * len(seeds)]
        rows.append([item.request.photo, item.request.prompt, *(open_picture(Path(image.picture)) for image in row)])
    return contact_sheet(rows, ["photo", "prompt", *(f"seed {seed}" for seed in seeds)])
