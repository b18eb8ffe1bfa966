"""Turn photos into the character: photo -> caption -> refined caption with the trigger -> img2img with the LoRA."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from lora_lab.adapters.attach import lora_attached
from lora_lab.adapters.files import resolve_lora
from lora_lab.adapters.metadata import prediction_from_metadata
from lora_lab.base import quantize
from lora_lab.base.load import pick_device, validate_prediction
from lora_lab.base.locate import locate_folder
from lora_lab.captions.rules import Rules, refine
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.evaluation.embedders import caption_images
from lora_lab.images.buckets import aspect_buckets, fit, nearest_bucket
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import distinct_names, refuse_used, save_picture, write_atomically, write_manifest, write_text
from lora_lab.sampling.generate import Request, check_strength, generate
from lora_lab.sampling.render import load_base_for_sampling
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class Drawn:
    photo: str
    caption: str | None  # what the captioner said; None if stage.prompt was given
    prompt: str
    seed: int
    picture: str


@dataclass(frozen=True)
class Img2imgResult:
    stage: str
    lora: str | None
    strength: float
    pictures: list[Drawn]
    sheet: str  # photos and pictures side by side


def img2img(config: Config, folder: Path) -> Img2imgResult:
    """Draw every photo with every seed into `folder`. Raises InputError before any model is loaded."""
    stage, model = config.stage, config.model
    if not config.resume:
        refuse_used(folder, "prompts.jsonl")
    check_strength(config.sampler.steps, stage.strength)
    paths = find_photos(stage.photo)
    buckets = aspect_buckets(model.resolution, model.bucket_step)
    opened = [open_picture(path) for path in paths]
    photos = [fit(picture, nearest_bucket(picture.size, buckets)).picture for picture in opened]
    lora = _lora(config)
    loss = prediction_from_metadata(config.loss, model.base, lora)
    validate_prediction(model, loss)
    device = pick_device(config.device)
    quantize.validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    attached = f"{lora} at {stage.lora_weight:g}" if lora else "no LoRA"
    say(f"{len(photos)} photos, strength {stage.strength:g}, {attached}, {model.base} on {device}")
    captions = [None] * len(photos) if stage.prompt else caption_images(config.captioner, opened, device)
    rules = Rules.from_config(**asdict(config.refiner))
    prompts = [refine(text, config.trigger, rules) if text else _given(config) for text in captions]
    write_manifest(folder, device, {})

    names = distinct_names(paths)
    asked = [(i, seed) for i in range(len(photos)) for seed in stage.seeds]
    requests = [Request(prompts[i], seed, photos[i].size, photos[i], stage.strength) for i, seed in asked]
    encoder = load_base_for_sampling(model, config.memory, loss, device)
    pictures: list[Image.Image] = []
    drawn: list[Drawn] = []
    with lora_attached(encoder.base, lora, stage.lora_weight, config.sampler.fuse):
        for (i, seed), picture in zip(asked, generate(encoder.base, requests, config.sampler, encoder), strict=True):
            file = folder / f"{names[i]}-s{seed}.png"  # saved at once: Ctrl-C loses only what is not drawn yet
            notes = {"prompt": prompts[i], "seed": seed, "strength": stage.strength, "lora": lora and lora.name}
            save_picture(file, picture, notes)
            pictures.append(picture)
            drawn.append(Drawn(str(paths[i]), captions[i], prompts[i], seed, str(file)))
    write_text(folder / "prompts.jsonl", "".join(json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in drawn))
    per_photo = [pictures[i : i + len(stage.seeds)] for i in range(0, len(pictures), len(stage.seeds))]
    rows = [[photo, prompt, *row] for photo, prompt, row in zip(photos, prompts, per_photo, strict=True)]
    sheet = contact_sheet(rows, ["photo", "prompt", *(f"seed {seed}" for seed in stage.seeds)])
    write_atomically(folder / "sheet.png", sheet.save)
    say(f"{len(drawn)} drawn in {folder}, side by side in {folder / 'sheet.png'}")
    return Img2imgResult("img2img", lora and str(lora), stage.strength, drawn, str(folder / "sheet.png"))


def find_photos(value: object) -> list[Path]:
    """The files that `stage.photo` means: a picture, a folder of pictures, or a list of either."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str) for item in values):
        raise InputError(f"stage.photo={value}: name a picture, a folder of pictures, or a list: [me.jpg,you.png]")
    found: list[Path] = []
    for item in values:
        path = locate_folder("stage.photo", item)
        found += find_pictures(path).values() if path.is_dir() else [path]
    return found


def _lora(config: Config) -> Path | None:
    """The file to wear. A prompt of one's own need not have the trigger."""
    if not config.stage.lora_weight:
        return None
    if config.lora is None:
        raise InputError("lora is missing: say lora=FILE, lora=NAME of models/lora, or lora=RUN FOLDER")
    if isinstance(config.lora, list):
        raise InputError(f"lora={config.lora}: pictures are drawn with one LoRA, name that")
    return resolve_lora(str(config.lora), None if config.stage.prompt else config.trigger)


def _given(config: Config) -> str:
    return config.stage.prompt.replace("{trigger}", config.trigger)
