"""How stage=img2img draws each photo: chosen by drafts, which a judge scores as it scores the images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Encoder
from lora_lab.captions.refiner import load_refiner
from lora_lab.evaluation.resemblance import DrawnImage, ResemblanceJudge
from lora_lab.images.pixels import aspect_buckets, open_fitted, open_picture
from lora_lab.sampling.drafts import best_drafts, variants

if TYPE_CHECKING:
    from lora_lab.stages.img2img import GeneratedImage, PhotoImages, PhotoSpec


def load_judge(run: "PhotoImages", references: Sequence[Path], base: Callable[[], Encoder]) -> ResemblanceJudge:
    """The judge of the run's images, for which drafts of the base alone are drawn over the photos."""
    config = run.config
    sampler = replace(config.sampler, steps=config.stage.draft_steps)
    strength = max(run.photo_requests[0].request.strength, 1 / sampler.steps)
    jobs = run.jobs(run.base_specs(strength), sampler)
    run.draw(jobs, sampler, base)
    photos = [item.request.photo for item in run.photo_requests]
    before = [open_picture(Path(job.image.picture)) for job in jobs]
    buckets = aspect_buckets(config.model.resolution, config.model.bucket_step)
    images = [open_fitted(file, buckets) for file in references]
    refiner = load_refiner(config.refiner)
    encoder = base()
    with lora_attached(encoder.base, None):
        return ResemblanceJudge.load(
            config.model, config.captioner, refiner, config.character, images, photos, before, encoder
        )


Drafts = dict[tuple[int, int], list[dict[str, Any]]]  # photo and seed -> what prompts.jsonl says of the drafts


def choose(
    run: "PhotoImages", judge: ResemblanceJudge, base: Callable[[], Encoder], strength: float
) -> tuple[list["PhotoSpec"], Drafts]:
    """The images to draw in full: for each photo and seed the variants whose drafts have the best scores."""
    stage = run.config.stage
    sampler = replace(run.config.sampler, steps=stage.draft_steps)
    tried = variants(stage.lora_weight, stage.strength, strength, stage.budget, sampler.steps)
    jobs = run.jobs(run.draft_specs(tried), sampler)
    run.draw(jobs, sampler, base)
    drawn = [DrawnImage(open_picture(Path(job.image.picture)), job.number, job.request.prompt) for job in jobs]
    with lora_attached(base().base, None):
        scores, parts = judge.measure(drawn, base())
    chosen, drafts = [], {}
    for i, (photo, seed) in enumerate(run.pairs):
        own = range(i, len(jobs), len(run.pairs))
        best = best_drafts([scores[j].resemblance for j in own], parts[[*own]], stage.choices)
        for place, number in enumerate(best):
            chosen.append(run.chosen_spec(photo, seed, tried[number], place))
        drafts[photo, seed] = [
            {
                "picture": jobs[j].image.picture, "lora_weight": jobs[j].image.lora_weight,
                "strength": jobs[j].image.strength, "scores": scores[j].scores,
            }
            for j in own
        ]  # fmt: skip
    return chosen, drafts


def scored(
    images: Sequence["GeneratedImage"], judge: ResemblanceJudge, paths: Sequence[Path], encoder: Encoder
) -> list["GeneratedImage"]:
    """The images with their scores."""
    numbers = {str(path): number for number, path in enumerate(paths)}
    drawings = [DrawnImage(open_picture(Path(i.picture)), numbers[i.photo], i.prompt) for i in images]
    with lora_attached(encoder.base, None):
        scores, _ = judge.measure(drawings, encoder)
    return [
        replace(image, scores=of_image.scores, kept=dict(of_image.attributes))
        for image, of_image in zip(images, scores, strict=True)
    ]
