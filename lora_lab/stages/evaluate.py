"""Score LoRA files, of any trainer, by the images they render: fidelity to character and prompt, and leakage."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_lab.adapters.files import prediction_from_metadata, resolve_lora
from lora_lab.base.layers import validate_quantization
from lora_lab.base.load import pick_device, pick_dtype, validate_prediction
from lora_lab.base.locate import hash_model, locate_folder, locate_model
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.evaluation.metrics import Scores
from lora_lab.evaluation.scores import (
    ScoredImages,
    ScorePrompts,
    Scorer,
    held_out_pictures,
    pictures_in,
    table,
    validate_embedders,
    write_lines,
)
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import distinct_names, refuse_used, write_atomically, write_manifest
from lora_lab.sampling.generate import load_base_for_sampling, render_settings
from lora_lab.settings.schema import Config, Loss


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
    trigger: str
    scores_before: Scores  # of the base without a LoRA
    loras: list[Evaluated]  # in the order they were named
    lines: str  # scores.jsonl: the scores of every image
    sheet: str  # the base's images and every LoRA's side by side


def evaluate(config: Config, folder: Path) -> EvaluateResult:
    """Score every file of `config.lora` into `folder`. Raises InputError before any model is loaded."""
    if not config.resume:
        refuse_used(folder, "scores.jsonl")
    if config.model.judge is None:
        raise InputError("model.judge=null: scores need a CLIP, set model.judge= to one")
    loras = _loras(config)
    loss = _loss(config, loras)
    base = locate_model("model.base", config.model.base)
    validate_prediction(config.model, loss)
    validate_embedders(config.model, config.score, config.captioner)
    device = pick_device(config.device)
    dtype = pick_dtype(config.model.precision, device)
    validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    training = _training_pictures(config)
    held_out = held_out_pictures(config.model, config.score)
    references = f"{len(held_out)} held-out pictures" if held_out else f"{len(training)} training pictures"
    prompts = ScorePrompts.of(config.score, config.trigger, config.class_noun)
    say(
        f"{len(loras)} LoRA of {config.trigger}, {len(prompts.specs)} pictures each, compared with {references}, "
        f"{config.model.base} on {device}"
    )
    hashes = {"base": hash_model(base)}
    write_manifest(folder, device, hashes)
    scorer = Scorer.load(
        prompts, config.model, config.captioner, config.refiner, config.trigger, training, held_out, device
    )
    encoder = load_base_for_sampling(config.model, config.memory, loss, device)
    render = render_settings(
        config.model, config.loss, config.memory, config.sampler, config.cache, hashes["base"], dtype
    )
    before = scorer.score_base(render, folder, encoder)
    places = [folder / "samples" / name for name in distinct_names(loras)]
    scored = [scorer.score(lora, render, place, encoder) for lora, place in zip(loras, places, strict=True)]
    lines = write_lines(folder, [before, *scored])
    sheet = _sheet([before, *scored], folder / "sheet.png")
    say(f"\n{table([before, *scored])}\n\npictures side by side in {sheet}, one by one in {lines}")
    return EvaluateResult(
        stage="evaluate",
        trigger=config.trigger,
        scores_before=before.scores,
        loras=[
            Evaluated(str(lora), images.scores, str(place))
            for lora, images, place in zip(loras, scored, places, strict=True)
        ],
        lines=str(lines),
        sheet=str(sheet),
    )


def _loras(config: Config) -> list[Path]:
    values = config.lora if isinstance(config.lora, list) else [config.lora]
    if not values or None in values:
        raise InputError("lora is missing: set lora=FILE, lora=NAME of models/lora, lora=RUN FOLDER, or lora=[A,B]")
    return [resolve_lora(str(value), config.trigger) for value in values]


def _loss(config: Config, loras: list[Path]) -> Loss:
    """`config.loss` with the prediction of the base. Raises InputError where the files state different ones."""
    first, *others = [prediction_from_metadata(config.loss, config.model.base, lora) for lora in loras]
    for lora, loss in zip(loras[1:], others, strict=True):
        if loss != first:
            raise InputError(
                f"{lora.name} and {loras[0].name} were trained on different predictions: score them separately"
            )
    return first


def _training_pictures(config: Config) -> list[Image.Image]:
    roots = [locate_folder("dataset.root", folder.root) for folder in config.dataset.folders]
    follow_links = config.dataset.follow_links
    return [picture for root in roots for picture in pictures_in(root, "dataset.root", config.model, follow_links)]


def _sheet(scored: list[ScoredImages], path: Path) -> Path:
    """A row for each prompt and seed, a column for the base and for each LoRA."""
    pictures = zip(*(images.pictures for images in scored), strict=True)
    rows = [
        [f"{line['prompt']} (seed {line['seed']})", *row] for line, row in zip(scored[0].lines, pictures, strict=True)
    ]
    sheet = contact_sheet(rows, ["prompt", *(images.name for images in scored)])
    return write_atomically(path, sheet.save)
