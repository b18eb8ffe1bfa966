"""check -> caption -> refine -> train -> img2img, into one run folder."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lora_lab.base.locate import locate_folder
from lora_lab.captions.files import read_captions, write_captions
from lora_lab.console import say
from lora_lab.evaluation.metrics import Scores
from lora_lab.images.dataset import copy_pictures
from lora_lab.images.pixels import open_picture
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import refuse_used, write_atomically
from lora_lab.settings.schema import Caption, Check, Config, Refine, Stage
from lora_lab.training.checkpoint import checkpoints


@dataclass(frozen=True)
class PipelineResult:
    stage: str
    name: str
    trigger: str
    lora: str
    model: str | None
    steps: int
    seconds: float
    loss: float
    scores_before: Scores | None
    scores: Scores | None
    overview: str  # photo | caption | without the LoRA | with it
    dataset: str  # the captioned copy


def pipeline(config: Config, folder: Path) -> PipelineResult:
    """Work on a copy of dataset.root in `folder`, so that the user's captions stay as they are."""
    from lora_lab.stages import stage

    began = time.perf_counter()
    copy = folder / "dataset"
    if not config.resume:
        refuse_used(folder, "dataset")
    if not copy.exists():  # it does when a killed pipeline goes on
        copy_dataset(locate_folder("dataset.root", config.dataset.folder), copy, config.stage.captions == "keep")
    config = replace(config, dataset=replace(config.dataset, root=str(copy)))

    def do(name: str, what: Stage, where: Path, **changes: object):
        say(f"\n== {name}")
        return stage(name)(replace(config, stage=what, **changes), where)

    do("check", Check(), folder)
    do("caption", Caption(mode="missing"), folder)
    do("refine", Refine(), folder)
    goes_on = bool(checkpoints(folder))
    if config.resume and not goes_on:
        # Killed before the first checkpoint: training begins again, and its steps write the very same lines.
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    trained = do("train", config.stage.train, folder, resume=config.resume if goes_on else None)
    drawing = config.stage.img2img
    before = do("img2img", replace(drawing, lora_weight=0.0), folder / "img2img" / "before")
    after = do("img2img", drawing, folder / "img2img" / "after", lora=trained.lora)
    overview = draw_overview(before.pictures, after.pictures, folder / "overview.png")
    base = "" if config.model.name == "tiny" else f"model={config.model.name} "
    score = f" (score {trained.scores['score'].value:.2f})" if trained.scores else ""
    say(f"\n{config.trigger} was learnt in {trained.steps} steps{score}: {trained.lora}")
    say(f"look at {overview}: photo, caption, without the LoRA, with it")
    lora = config.name if trained.model else folder
    say(f"next, your own photo: python -m lora_lab stage=img2img {base}lora={lora} stage.photo=me.jpg")
    return PipelineResult(
        stage="pipeline",
        name=config.name,
        trigger=config.trigger,
        lora=trained.lora,
        model=trained.model,
        steps=trained.steps,
        seconds=round(time.perf_counter() - began, 1),
        loss=trained.loss,
        scores_before=trained.scores_before,
        scores=trained.scores,
        overview=str(overview),
        dataset=str(copy),
    )


def copy_dataset(root: Path, to: Path, captions: bool) -> None:
    """Copy the pictures, and the captions if wanted, whole or not at all."""
    temporary = to.with_name(f".{to.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    copy_pictures(root, temporary)
    kept = read_captions(root) if captions else {}
    if kept:
        write_captions(temporary, kept)
    temporary.rename(to)


def draw_overview(before: list, after: list, path: Path) -> Path:
    rows = []
    for old, new in zip(before, after, strict=True):
        pictures = [open_picture(Path(file)) for file in (old.photo, old.picture, new.picture)]
        rows.append([pictures[0], f"{old.caption}\n\n{new.prompt}" if old.caption else new.prompt, *pictures[1:]])
    sheet = contact_sheet(rows, ["photo", "caption and prompt", "without the LoRA", "with the LoRA"])
    return write_atomically(path, sheet.save)
