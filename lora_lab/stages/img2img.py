"""stage=img2img: draw the character in place of the subject of each photo."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image

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
from lora_lab.base.load import base_class, layer_shapes, pick_device, pick_dtype, token_counter, validate_prediction
from lora_lab.base.locate import hash_model, locate_model
from lora_lab.base.protocol import PhotoConditioned
from lora_lab.captions.captioner import Settings, check_captioner, images_per_call, load_captioner, run_captioner
from lora_lab.captions.refiner import AUTO, load_refiner, strip_setting
from lora_lab.captions.syntax import length_warnings, prompt_warnings
from lora_lab.console import printable, say
from lora_lab.errors import InputError
from lora_lab.evaluation.resemblance import mean_scores, references_of
from lora_lab.images.pixels import aspect_buckets, open_fitted, open_picture
from lora_lab.images.sheet import contact_sheet, labelled, montage
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
from lora_lab.sampling.drafts import Variant
from lora_lab.sampling.generate import (
    PhotoRequest,
    Request,
    base_for_sampling,
    batches_of,
    check_strength,
    find_photos,
    generate,
    photo_to_request,
    render_settings,
)
from lora_lab.sampling.structure import check_conditions, controls_of, masks_of
from lora_lab.settings.schema import Config, Img2img, Loss, Sampler
from lora_lab.shared import Shared
from lora_lab.stages.photo_choice import Drafts, choose, load_judge, scored

PROMPTS = "prompts.jsonl"  # a line for each image
CAPTIONS = "captions.jsonl"  # a line for each photo


@dataclass(frozen=True)
class GeneratedImage:
    photo: str  # path
    caption: str | None  # the captioner's caption of the photo; None with stage.prompt
    prompt: str
    seed: int
    picture: str  # path
    lora_weight: float  # 0 without a LoRA
    strength: float
    scores: dict[str, float] | None = None  # Resemblance.scores; None without references
    kept: dict[str, float] | None = None  # Resemblance.attributes
    drafts: list[dict[str, Any]] | None = None  # of stage.auto: picture, lora_weight, strength and scores of each


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
    config = replace(config, text=text_from_metadata(config.text, lora))
    references = _references(config, lora)
    if stage.prompt:
        count_tokens = token_counter(config.model.base)
        for line in prompt_warnings({"stage.prompt": stage.prompt}, config.triggers, count_tokens, config.text.window):
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
    triggers = [] if config.stage.prompt else [config.character]
    lora = resolve_lora(str(config.lora), triggers, layer_shapes(config.model))
    trained = triggers_of(lora)
    if trained and trained.all[1:]:
        words = printable(trained.phrase, 200)
        say(f"{lora.name} has the characters {words}: {config.character} is drawn, trigger= chooses")
    return lora


def _references(config: Config, lora: Path | None) -> list[Path]:
    """The LoRA's training images, [] if they are not known, which is printed. Raises InputError for a missing folder,
    and if stage.auto needs the images."""
    stage = config.stage
    if lora is None or not stage.resemblance:
        return []
    references = references_of(lora, config.dataset, config.character)
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
    return [open_fitted(path, buckets) for path in paths]


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
        if strip_setting(config.refiner) == AUTO:
            say("captions of photos are not stripped: refiner.strip=auto knows a folder's only, name a list of phrases")
        check_captioner(config.captioner)
        captions = _captions(config.captioner, paths, device, folder / CAPTIONS, shared)
    requests = [
        photo_to_request(photo, text, refiner, config.character, buckets, prompt=stage.prompt)
        for photo, text in zip(photos, captions, strict=True)
    ]
    if not stage.prompt:  # a prompt of the user's was looked at before the captioner was loaded
        prompts = [item.request.prompt for item in requests]
        _say_long(dict(zip(distinct_names(paths), prompts, strict=True)), config.model.base, config.text.window)
    return requests


def _say_long(prompts: Mapping[str, str], base: str, window: int) -> None:
    """Print which prompts, by the names of their photos, have more tokens than are read."""
    count_tokens = token_counter(base)
    tokens = {name: count_tokens(prompt) for name, prompt in prompts.items()} if count_tokens else {}
    long = {name: count for name, count in tokens.items() if count > window}
    for line in length_warnings(long, window, "the prompt of ") if long else ():
        say(line)


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


@dataclass(frozen=True)
class Job:
    image: GeneratedImage
    request: Request
    key: str  # a hash of all that decides the pixels
    number: int  # of the photo

    def is_drawn(self) -> bool:
        """Whether the image file is there and was drawn from the same inputs with the same settings."""
        try:
            with Image.open(self.image.picture, formats=["PNG"]) as file:
                return file.text.get("key") == self.key
        except (OSError, SyntaxError, ValueError):
            return False


@dataclass(frozen=True)
class PhotoSpec:
    """One image to draw over a photo."""

    photo: int  # number
    seed: int
    variant: Variant
    file: str  # name in the run's folder


@dataclass(frozen=True)
class PhotoImages:
    """What all images of a run have in common."""

    config: Config
    paths: Sequence[Path]
    photo_requests: Sequence[PhotoRequest]
    loss: Loss
    lora: Path | None
    device: torch.device
    folder: Path

    @cached_property
    def names(self) -> list[str]:
        """A name for each photo."""
        return distinct_names(self.paths)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The number of the photo, and the seed, of every image, photo by photo."""
        return [(photo, seed) for photo in range(len(self.paths)) for seed in self.config.stage.seeds]

    def file(self, photo: int, seed: int, place: int = 0) -> str:
        """The name of an image; `place` counts the choices."""
        return f"{self.names[photo]}-s{seed}{f'-{place + 1}' if place else ''}.png"

    def usual_specs(self, strength: float) -> list[PhotoSpec]:
        """An image for each pair, with the weight of the settings."""
        variant = Variant(self.config.stage.usual_weight if self.lora else 0.0, strength)
        return [PhotoSpec(photo, seed, variant, self.file(photo, seed)) for photo, seed in self.pairs]

    def base_specs(self, strength: float) -> list[PhotoSpec]:
        """A draft of each photo by the base alone."""
        variant, seed = Variant(0.0, strength), self.config.stage.seeds[0]
        return [PhotoSpec(i, seed, variant, f"drafts/base/{name}.png") for i, name in enumerate(self.names)]

    def draft_specs(self, tried: Sequence[Variant]) -> list[PhotoSpec]:
        """A draft of each pair by each variant, variant by variant."""
        return [
            PhotoSpec(*pair, variant, f"drafts/w{variant.lora_weight:g}-{variant.strength:g}/{self.file(*pair)}")
            for variant in tried
            for pair in self.pairs
        ]

    def chosen_spec(self, photo: int, seed: int, variant: Variant, place: int) -> PhotoSpec:
        """The image of a chosen variant."""
        return PhotoSpec(photo, seed, variant, self.file(photo, seed, place))

    def load_base(self, stack: ExitStack, shared: Shared) -> Encoder:
        """The base with what the photos need beside it, until `stack` ends."""
        config = self.config
        encoder = stack.enter_context(
            base_for_sampling(shared, config.model, config.memory, self.loss, config.text, self.device)
        )
        if isinstance(encoder.base, PhotoConditioned):
            encoder.base.load_control(config.structure, self.device, config.memory.offload)
            encoder.base.load_likeness(config.likeness, self.device)
        return encoder

    def jobs(self, specs: Sequence[PhotoSpec], sampler: Sampler) -> list[Job]:
        """The requests of the images, with the hashes by which a resumed run knows their images."""
        lora = self.lora if any(spec.variant.lora_weight for spec in specs) else None
        common, jobs = self._key(sampler, lora), []
        schedule = tuple(self.config.stage.lora_schedule)
        changing = lora is not None and (len({spec.variant.lora_weight for spec in specs}) > 1 or {*schedule} != {1.0})
        for spec in specs:
            item, weight, strength = self.photo_requests[spec.photo], spec.variant.lora_weight, spec.variant.strength
            request = replace(item.request, seed=spec.seed, strength=strength)
            if changing:
                request = replace(request, lora_weight=weight, lora_schedule=schedule)
            path, file = self.paths[spec.photo], str(self.folder / spec.file)
            image = GeneratedImage(str(path), item.caption, request.prompt, spec.seed, file, weight, strength)
            decides = (
                self._photo_hashes[spec.photo],
                request.prompt,
                spec.seed,
                request.size,
                strength,
                weight,
                schedule,
            )
            jobs.append(Job(image, request, key_of(common, *decides, *_key_of_conditions(request)), spec.photo))
        return jobs

    def _key(self, sampler: Sampler, lora: Path | None) -> str:
        """A hash of what decides the pixels of all images alike: base, LoRA, sampler."""
        config, (base, conditions) = self.config, self._model_hashes
        dtype = pick_dtype(config.model.precision, self.device)
        render = render_settings(config.model, self.loss, config.memory, sampler, config.text, None, base, dtype)
        return key_of(render.base_key, self._lora_hash if lora else hash_files(), *conditions)

    @cached_property
    def _photo_hashes(self) -> list[str]:
        return [hash_files(path) for path in self.paths]

    @cached_property
    def _lora_hash(self) -> str:
        return hash_files(self.lora, *([embeddings_path(self.lora)] if read_tokens(self.lora) else []))

    @cached_property
    def _model_hashes(self) -> tuple[str, list[object]]:
        """The hash of the base, and what tells ControlNet and IP-Adapter from others: gigabytes, read once."""
        config = self.config
        base = hash_model(locate_model("model.base", config.model.base))
        models = {"structure.controlnet": config.structure.controlnet, "likeness.adapter": config.likeness.adapter}
        conditions = [hash_model(locate_model(key, name)) for key, name in models.items() if name]
        likeness = config.likeness
        conditions += [likeness.weights, likeness.encoder, likeness.scale] if likeness.kind != "off" else []
        return base, conditions

    def draw(
        self, jobs: Sequence[Job], sampler: Sampler, base: Callable[[], Encoder], stream: TextIO | None = None
    ) -> None:
        """Draw the jobs that are not drawn yet, and save each image at once, and its line in `stream`.

        Images of one batch depend on each other, so a batch is drawn whole or not at all."""
        waiting = iter(jobs)
        batches = [[next(waiting) for _ in b] for b in batches_of([job.request for job in jobs], sampler.batch_size)]
        states = [
            (job, is_drawn) for batch in batches for is_drawn in [all(j.is_drawn() for j in batch)] for job in batch
        ]
        missing = [job for job, is_drawn in states if not is_drawn]
        if stream:
            stream.write("".join(json_line(asdict(job.image)) for job, is_drawn in states if is_drawn))
            stream.flush()
        if not missing:
            return
        weight = missing[0].image.lora_weight
        lora, encoder = self.lora if weight else None, base()
        with lora_attached(encoder.base, lora, weight, sampler.fuse) as attached:
            requests = [job.request for job in missing]
            for job, image in zip(missing, generate(encoder.base, requests, sampler, encoder, attached), strict=True):
                metadata = {
                    "prompt": job.request.prompt, "seed": job.request.seed, "strength": job.request.strength,
                    "lora": lora and lora.name, "lora_weight": job.image.lora_weight, "key": job.key,
                }  # fmt: skip
                save_picture(Path(job.image.picture), image, metadata)
                if stream:
                    stream.write(json_line(asdict(job.image)))
                    stream.flush()


def json_line(row: Mapping[str, Any]) -> str:
    """The line of a file of JSON lines."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _key_of_conditions(request: Request) -> list[object]:
    """What decides a request's control and mask."""
    control, mask = request.control, request.mask
    numbers = [control.scale, control.end] if control else []
    images = [control.image] if control else []
    return [*numbers, *(key_of(image.tobytes()) for image in (*images, *([mask] if mask else [])))]


def draw(
    run: PhotoImages, specs: Sequence[PhotoSpec], drafts: Drafts, base: Callable[[], Encoder]
) -> list[GeneratedImage]:
    """Draw the images in full, each with its line in prompts.jsonl at once."""
    jobs = run.jobs(specs, run.config.sampler)
    jobs = [replace(job, image=replace(job.image, drafts=drafts.get((job.number, job.image.seed)))) for job in jobs]
    write_text(run.folder / PROMPTS, "")
    with (run.folder / PROMPTS).open("a", encoding="utf-8") as stream:
        run.draw(jobs, run.config.sampler, base, stream)
    return [job.image for job in jobs]


def sheet_of(images: Sequence[GeneratedImage], photo_requests: Sequence[PhotoRequest]) -> Image.Image:
    """A row for each photo: the photo, its prompt, and its images; with stage.auto a row for each seed, and at its end
    the drafts, of which the chosen ones have a frame."""
    rows, columns, count = [], 0, len(images) // len(photo_requests)
    for i, item in enumerate(photo_requests):
        own = images[i * count : (i + 1) * count]
        groups = [list(group) for _, group in groupby(own, lambda image: image.seed)] if own[0].drafts else [own]
        for group in groups:
            cells = [_labelled(i.picture, i.lora_weight, i.strength, i.scores) for i in group]
            columns = len(cells)
            rows.append([item.request.photo, item.request.prompt, *cells, *_drafts_cell(group)])
    titles = [f"seed {image.seed}" for image in images[:columns]]
    if images[0].drafts:
        titles = ["chosen", *(f"choice {place + 2}" for place in range(columns - 1)), "drafts"]
    return contact_sheet(rows, ["photo", "prompt", *titles])


def _drafts_cell(images: Sequence[GeneratedImage]) -> list[Image.Image]:
    """One image of the drafts that `images`, of one photo and seed, were chosen from; none without stage.auto."""
    drafts = images[0].drafts
    if not drafts:
        return []
    cells = [_labelled(d["picture"], d["lora_weight"], d["strength"], d["scores"]) for d in drafts]
    chosen = {(image.lora_weight, image.strength) for image in images}
    return [montage(cells, [i for i, d in enumerate(drafts) if (d["lora_weight"], d["strength"]) in chosen])]


def _labelled(file: str, lora_weight: float, strength: float, scores: dict[str, float] | None) -> Image.Image:
    """The image of the file, with its numbers beneath it."""
    text = f"LoRA {lora_weight:g}, strength {strength:g}"
    if scores:
        text += f": {scores['resemblance']:.2f} (character {scores['character']:.2f}, kept {scores['kept']:.2f})"
    return labelled(open_picture(Path(file)), text)
