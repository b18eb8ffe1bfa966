"""The images of stage=img2img: drawn over photos, chosen among drafts, scored, and set side by side."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image

from lora_lab.adapters.files import embeddings_path, read_tokens
from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Encoder, key_of
from lora_lab.base.load import pick_dtype
from lora_lab.base.locate import hash_model, locate_model
from lora_lab.base.protocol import PhotoConditioned
from lora_lab.captions.refiner import load_refiner
from lora_lab.evaluation.resemblance import DrawnImage, ResemblanceJudge
from lora_lab.images.pixels import aspect_buckets, fit, nearest_bucket, open_picture
from lora_lab.images.sheet import contact_sheet, labelled, montage
from lora_lab.runs import distinct_names, hash_files, save_picture, write_text
from lora_lab.sampling.drafts import Variant, best_drafts, variants
from lora_lab.sampling.generate import (
    PhotoRequest,
    Request,
    base_for_sampling,
    batches_of,
    generate,
    render_settings,
)
from lora_lab.settings.schema import Config, Loss, Sampler
from lora_lab.shared import Shared

PROMPTS = "prompts.jsonl"  # a line for each image


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

    @property
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

    def load_base(self, stack: ExitStack, shared: Shared) -> Encoder:
        """The base with what the photos need beside it, until `stack` ends."""
        config = self.config
        encoder = stack.enter_context(base_for_sampling(shared, config.model, config.memory, self.loss, self.device))
        if isinstance(encoder.base, PhotoConditioned):
            encoder.base.load_control(config.structure, self.device, config.memory.offload)
            encoder.base.load_likeness(config.likeness, self.device)
        return encoder

    def jobs(self, specs: Sequence[PhotoSpec], sampler: Sampler) -> list[Job]:
        """The requests of the images, with the hashes by which a resumed run knows their images."""
        lora = self.lora if any(spec.variant.lora_weight for spec in specs) else None
        common, hashes, jobs = self._key(sampler, lora), [hash_files(path) for path in self.paths], []
        schedule = tuple(self.config.stage.lora_schedule)
        changing = lora is not None and (len({spec.variant.lora_weight for spec in specs}) > 1 or {*schedule} != {1.0})
        for spec in specs:
            item, weight, strength = self.photo_requests[spec.photo], spec.variant.lora_weight, spec.variant.strength
            request = replace(item.request, seed=spec.seed, strength=strength)
            if changing:
                request = replace(request, lora_weight=weight, lora_schedule=schedule)
            path, file = self.paths[spec.photo], str(self.folder / spec.file)
            image = GeneratedImage(str(path), item.caption, request.prompt, spec.seed, file, weight, strength)
            decides = (hashes[spec.photo], request.prompt, spec.seed, request.size, strength, weight, schedule)
            jobs.append(Job(image, request, key_of(common, *decides, *_key_of_conditions(request)), spec.photo))
        return jobs

    def _key(self, sampler: Sampler, lora: Path | None) -> str:
        """A hash of what decides the pixels of all images alike: base, LoRA, sampler."""
        config = self.config
        base = hash_model(locate_model("model.base", config.model.base))
        dtype = pick_dtype(config.model.precision, self.device)
        render = render_settings(config.model, self.loss, config.memory, sampler, None, base, dtype)
        files = [lora, *([embeddings_path(lora)] if read_tokens(lora) else [])] if lora else []
        models = {"structure.controlnet": config.structure.controlnet, "likeness.adapter": config.likeness.adapter}
        conditions = [hash_model(locate_model(key, name)) for key, name in models.items() if name]
        likeness = config.likeness
        conditions += [likeness.weights, likeness.encoder, likeness.scale] if likeness.kind != "off" else []
        return key_of(render.base_key, hash_files(*files), *conditions)

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


def load_judge(run: PhotoImages, references: Sequence[Path], base: Callable[[], Encoder]) -> ResemblanceJudge:
    """The judge of the run's images, for which drafts of the base alone are drawn over the photos."""
    config, seed = run.config, run.config.stage.seeds[0]
    sampler = replace(config.sampler, steps=config.stage.draft_steps)
    strength = max(run.photo_requests[0].request.strength, 1 / sampler.steps)
    variant = Variant(0.0, strength)
    specs = [PhotoSpec(i, seed, variant, f"drafts/base/{name}.png") for i, name in enumerate(run.names)]
    jobs = run.jobs(specs, sampler)
    run.draw(jobs, sampler, base)
    photos = [item.request.photo for item in run.photo_requests]
    before = [open_picture(Path(job.image.picture)) for job in jobs]
    buckets = aspect_buckets(config.model.resolution, config.model.bucket_step)
    images = [fit(image, nearest_bucket(image.size, buckets)).picture for image in map(open_picture, references)]
    refiner = load_refiner(config.refiner)
    encoder = base()
    with lora_attached(encoder.base, None):
        return ResemblanceJudge.load(
            config.model, config.captioner, refiner, config.trigger, images, photos, before, encoder
        )


Drafts = dict[tuple[int, int], list[dict[str, Any]]]  # photo and seed -> what prompts.jsonl says of the drafts


def choose(
    run: PhotoImages, judge: ResemblanceJudge, base: Callable[[], Encoder], strength: float
) -> tuple[list[PhotoSpec], Drafts]:
    """The images to draw in full: for each photo and seed the variants whose drafts have the best scores."""
    stage = run.config.stage
    sampler = replace(run.config.sampler, steps=stage.draft_steps)
    tried = variants(stage.lora_weight, stage.strength, strength, stage.budget, sampler.steps)
    specs = [
        PhotoSpec(*pair, variant, f"drafts/w{variant.lora_weight:g}-{variant.strength:g}/{run.file(*pair)}")
        for variant in tried
        for pair in run.pairs
    ]
    jobs = run.jobs(specs, sampler)
    run.draw(jobs, sampler, base)
    drawn = [DrawnImage(open_picture(Path(job.image.picture)), job.number, job.request.prompt) for job in jobs]
    with lora_attached(base().base, None):
        scores, parts = judge.measure(drawn, base())
    chosen, drafts = [], {}
    for i, (photo, seed) in enumerate(run.pairs):
        own = range(i, len(jobs), len(run.pairs))
        best = best_drafts([scores[j].resemblance for j in own], parts[[*own]], stage.choices)
        for place, number in enumerate(best):
            chosen.append(PhotoSpec(photo, seed, tried[number], run.file(photo, seed, place)))
        drafts[photo, seed] = [
            {
                "picture": jobs[j].image.picture, "lora_weight": jobs[j].image.lora_weight,
                "strength": jobs[j].image.strength, "scores": scores[j].scores,
            }
            for j in own
        ]  # fmt: skip
    return chosen, drafts


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


def scored(
    images: Sequence[GeneratedImage], judge: ResemblanceJudge, paths: Sequence[Path], encoder: Encoder
) -> list[GeneratedImage]:
    """The images with their scores."""
    numbers = {str(path): number for number, path in enumerate(paths)}
    drawings = [DrawnImage(open_picture(Path(i.picture)), numbers[i.photo], i.prompt) for i in images]
    with lora_attached(encoder.base, None):
        scores, _ = judge.measure(drawings, encoder)
    return [
        replace(image, scores=of_image.scores, kept=dict(of_image.attributes))
        for image, of_image in zip(images, scores, strict=True)
    ]


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
