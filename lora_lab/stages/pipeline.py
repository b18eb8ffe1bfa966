"""stage=pipeline: a LoRA from a folder of images in one command, by the other stages in this order.

1. check: refuse a dataset that cannot be trained on.
2. caption: write the missing captions.
3. refine: put the trigger into every caption.
4. train: train the LoRA.
5. img2img: draw the demo's or the user's photos twice, without and with the LoRA.

All of them work in one run folder, on a copy of the dataset, so that the user's captions stay unchanged. The result is
an overview image: photo, caption and prompt, without the LoRA, with the LoRA. A killed pipeline resumes with resume=.
"""

import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.base.locate import locate_folder
from lora_lab.captions.captioner import check_captioner
from lora_lab.captions.files import read_captions, write_captions
from lora_lab.captions.refiner import check_refiner
from lora_lab.console import say
from lora_lab.evaluation.metrics import Scores
from lora_lab.images.dataset import copy_pictures, say_unused
from lora_lab.images.pixels import open_picture
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import display_path, refuse_used, stage_function, write_atomically
from lora_lab.settings.schema import Caption, Check, Config, Refine, Stage
from lora_lab.training.lora_training import checkpoints

if TYPE_CHECKING:
    from lora_lab.stages.img2img import GeneratedImage


@dataclass(frozen=True)
class PipelineResult:
    stage: str
    name: str
    trigger: str
    lora: str  # path
    model: str | None  # path of the copy in models/lora
    steps: int
    seconds: float
    loss: float
    scores_before: Scores | None  # of the base without the LoRA
    scores: Scores | None
    overview: str  # path
    dataset: str  # path of the captioned copy


def pipeline(config: Config, folder: Path) -> PipelineResult:
    """Run check, caption, refine, train and img2img in `folder`, on a copy of dataset.root.

    Raises InputError, before the copy is made, for a used folder and wrong settings of captioner and refiner; and what
    the stages raise."""
    start_time = time.perf_counter()
    check_captioner(config.captioner)
    check_refiner(config.refiner)
    dataset = prepare_dataset(config, folder)
    root = config.dataset.root
    config = replace(config, dataset=replace(config.dataset, root=str(dataset)))
    if not (config.resume and passed_check(folder)):
        run_stage("check", config, Check(), folder)
    run_stage("caption", config, Caption(mode="missing"), folder)
    run_stage("refine", config, Refine(), folder)
    trained = run_stage("train", config, config.stage.train, folder, resume=resume_training(config.resume, folder))
    img2img, images = config.stage.img2img, folder / "img2img"
    before = run_stage("img2img", config, replace(img2img, lora_weight=0.0, auto=None), images / "before")
    after = run_stage("img2img", config, img2img, images / "after", lora=trained.lora)
    best = after.pictures[:: len(after.pictures) // len(before.pictures)]  # the first of stage.img2img.choices
    result = PipelineResult(
        stage="pipeline",
        name=config.name,
        trigger=config.character,
        lora=trained.lora,
        model=trained.model,
        steps=trained.steps,
        seconds=round(time.perf_counter() - start_time, 1),
        loss=trained.loss,
        scores_before=trained.scores_before,
        scores=trained.scores,
        overview=str(draw_overview(before.pictures, best, folder / "overview.png")),
        dataset=str(dataset),
    )
    say(summary(result, config.model.name, str(root), folder))
    return result


def run_stage(name: str, config: Config, stage_settings: Stage, folder: Path, **changes: object):
    """The result of another stage, run in `folder` with its settings and other `changes` of the configuration."""
    say(f"\n== {name}")
    return stage_function(type(stage_settings))(replace(config, stage=stage_settings, **changes), folder)


def passed_check(folder: Path) -> bool:
    """Whether the images passed the check before they were captioned, of which check.json is to remain the report."""
    file = folder / "check.json"
    return file.is_file() and not json.loads(file.read_text(encoding="utf-8"))["errors"]


def prepare_dataset(config: Config, folder: Path) -> Path:
    """The copy of dataset.root in `folder`, which exists already if a killed pipeline resumes.

    Raises InputError if a new pipeline finds a copy of another one."""
    dataset = folder / "dataset"
    if not config.resume:
        refuse_used(folder, "dataset")
    if not dataset.exists():
        root = locate_folder("dataset.root", config.dataset.folder)
        say_unused([root], config.dataset.follow_links)
        copy_dataset(root, dataset, config.stage.captions == "keep", config.dataset.follow_links)
    return dataset


def copy_dataset(root: Path, to: Path, with_captions: bool, follow_links: bool = False) -> None:
    """Copy the images, and the captions if `with_captions`, into the new folder `to`, completely or not at all."""
    temporary = to.with_name(f".{to.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    copy_pictures(root, temporary, follow_links)
    captions = read_captions(root, follow_links) if with_captions else {}
    if captions:
        write_captions(temporary, captions)
    temporary.rename(to)


def resume_training(resume: str | None, folder: Path) -> str | None:
    """`resume` for stage=train: None if the pipeline was killed before the first checkpoint, so training starts anew.

    In that case metrics.jsonl is removed: the same steps write the same lines again."""
    if resume and not checkpoints(folder):
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        return None
    return resume


def draw_overview(before: "Sequence[GeneratedImage]", after: "Sequence[GeneratedImage]", path: Path) -> Path:
    """Write a contact sheet with a row for each photo: photo, caption and prompt, without and with the LoRA."""
    rows = []
    for old, new in zip(before, after, strict=True):
        photo, without, with_lora = (open_picture(Path(file)) for file in (old.photo, old.picture, new.picture))
        text = f"{old.caption}\n\n{new.prompt}" if old.caption else new.prompt
        rows.append([photo, text, without, with_lora])
    sheet = contact_sheet(rows, ["photo", "caption and prompt", "without the LoRA", "with the LoRA"])
    return write_atomically(path, sheet.save)


def summary(result: PipelineResult, model_name: str, root: str, folder: Path) -> str:
    """The last lines of the run: the result, the overview, and the command for the user's own photo."""
    score = f" (score {result.scores['score'].value:.2f})" if result.scores else ""
    base = "" if model_name == "tiny" else f"model={model_name} "
    own = "" if root.startswith("demo:") else f"trigger={result.trigger} {shlex.quote(f'dataset.root={root}')} "
    lora = result.name if result.model else display_path(folder)
    return "\n".join(
        [
            f"\n{result.trigger} was learnt in {result.steps} steps{score}: {display_path(Path(result.lora))}",
            f"look at {display_path(Path(result.overview))}: photo, caption, without the LoRA, with it",
            f"next, your own photo: python -m lora_lab stage=img2img {base}lora={lora} {own}stage.photo=me.jpg",
        ]
    )
