"""What a training run will do, known and checked before anything heavy is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from peft import PeftConfig
from PIL import Image

from lora_lab import track
from lora_lab.adapters import inject
from lora_lab.adapters.attach import MODELS, find_lora
from lora_lab.adapters.tokens import embeddings_path, read_tokens
from lora_lab.base import quantize
from lora_lab.base.load import pick_device, pick_dtype
from lora_lab.base.locate import hash_model, locate_folder, locate_model
from lora_lab.base.prediction import validate_prediction
from lora_lab.errors import InputError
from lora_lab.evaluation.scores import held_out_pictures, validate_embedders
from lora_lab.images.buckets import Fitted
from lora_lab.images.dataset import Sample, read_dataset, read_folders
from lora_lab.images.masks import find_masks
from lora_lab.runs import hash_files, hash_text, refuse_unwritable
from lora_lab.settings.decides import training_fingerprint
from lora_lab.settings.schema import Config, OptimizerTraits
from lora_lab.training import class_pictures, text_encoders
from lora_lab.training.checkpoint import checkpoints, validate_fingerprint
from lora_lab.training.data import caption_texts, check_trigger, count_buckets, crop_pictures, fit_pictures
from lora_lab.training.memory import memory_line
from lora_lab.training.randomness import batches_per_epoch

T = TypeVar("T")
EXTRAS = {"prodigyopt": "optimizers", "schedulefree": "optimizers", "pytorch_optimizer": "optimizers"}  # in pyproject


@dataclass(frozen=True)
class Plan:
    samples: list[Sample]
    pictures: list[Fitted]  # of the samples, in their order, cut at the centre
    crops: list[list[Fitted]]  # what is trained on of each
    texts: list[list[list[str]]]  # of each sample, of each of its captions: the orders of its phrases
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    elementwise: bool  # whether that may be given all that learns as one tensor
    held_out: list[Sample]  # of stage.validation_root; [] without one
    held_out_pictures: list[Fitted]  # of those, in their order
    compared: list[Image.Image]  # that scores compare with in place of the training pictures; [] if none are held out
    class_samples: list[Sample]  # of the prior; [] without class pictures
    class_pictures: list[Fitted]  # of those that are on disk, in their order; prior=generated draws the others
    adapter: PeftConfig
    start: Path | None  # the LoRA file that the adapter begins with
    device: torch.device
    dtype: torch.dtype  # of the frozen base
    goes_on: Path | None  # the checkpoint to go on from
    recipe: dict  # what a run that goes on must have in common with this one
    hashes: dict[str, str]


def make_plan(config: Config, folder: Path, like: Plan | None = None) -> Plan:
    """Read everything that can be wrong: dataset, base, libraries, checkpoint. Raises InputError.

    `like` is the plan of a run of the same base and the same pictures, which are not read again then."""
    base = locate_model("model.base", config.model.base)
    validate_prediction(config.model.base, config.loss)
    device = pick_device(config.device)
    # Without patterns peft wants an empty dict, which Hydra would let nobody add to.
    adapter = from_library("adapter", {key: {} if value is None else value for key, value in config.adapter.items()})
    start = find_lora(config.stage.start_from, "stage.start_from") if config.stage.start_from else None
    inject.validate_adapter(adapter, config.adapter, config.stage.lora_plus_ratio, start)
    make_optimizer = from_library("optimizer", settled_optimizer(config.optimizer, device))
    text_encoders.validate_text(config, adapter, make_optimizer([torch.nn.Parameter(torch.zeros(1))]), start)
    if config.stage.ema_decay and hasattr(get_class(config.optimizer["_target_"]), "eval"):
        raise InputError("stage.ema_decay: the optimizer saves an average of its own, say stage.ema_decay=0")
    quantize.validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    dtype = pick_dtype(config.model.precision, device)
    known = vars(like) if like else _read(config, folder, base, dtype)
    hashes = known["hashes"]
    if start:
        hashes = hashes | {"start": hash_files(start, *([embeddings_path(start)] if read_tokens(start) else []))}
    # What is measured decides nothing.
    decisive = {name: value for name, value in hashes.items() if name != "validation"}
    recipe, goes_on = training_fingerprint(config) | decisive, _newest_checkpoint(config, folder)
    if goes_on:
        validate_fingerprint(goes_on, recipe)
    if not like:
        known |= _opened(config, known["samples"], known["held_out"], known["class_samples"])
    own = {
        "make_optimizer": make_optimizer,
        "elementwise": config.optimizer["elementwise"],
        "adapter": adapter,
        "start": start,
        "device": device,
        "dtype": dtype,
        "goes_on": goes_on,
        "recipe": recipe,
        "hashes": hashes,
    }
    return Plan(**(known | own))


def _read(config: Config, folder: Path, base: str, dtype: torch.dtype) -> dict:
    """What a Plan has of the captions, and of the pictures' and the base's files."""
    dataset, masks = config.dataset, find_masks(config.loss.mask)
    samples = read_folders([(locate_folder("dataset.root", f.root), f.repeats) for f in dataset.folders])
    texts = [caption_texts(sample.captions, dataset, config.trigger) for sample in samples]
    check_trigger(texts, config.trigger)
    hashes = {
        "base": hash_model(base),
        "dataset": hash_files(*(s.path for s in samples)),
        "captions": hash_text("\n".join("\t".join([s.name, *s.captions]) for s in samples)),
    }
    if config.loss.masks == "folder":
        hashes["masks"] = hash_files(*(masks.file(s.name) for s in samples))
    of_class = class_pictures.class_samples(config, folder, hashes["base"], dtype, samples)
    if of_class:
        hashes["prior"] = class_pictures.hash_of(of_class, config)
    held_out = []
    if config.stage.validation_root:
        held_out = read_dataset(locate_folder("stage.validation_root", config.stage.validation_root))
        hashes["validation"] = hash_files(*(s.path for s in held_out))
    validate_embedders(config)
    track.refuse_missing(config.tracker.kind)
    if config.cache is not None:
        refuse_unwritable(Path(config.cache), "name another with cache=, or say cache=null")
    return {"samples": samples, "texts": texts, "held_out": held_out, "class_samples": of_class, "hashes": hashes}


def _opened(config: Config, samples: list[Sample], held_out: list[Sample], class_samples: list[Sample]) -> dict:
    """What a Plan has of the pictures themselves."""
    dataset, masks = config.dataset, find_masks(config.loss.mask)
    resolution, step = config.model.resolution, config.model.bucket_step
    pictures = fit_pictures(samples, resolution, step, masks)
    measured = fit_pictures(held_out, resolution, step, None)
    return {
        "pictures": pictures,
        "crops": crop_pictures(samples, pictures, masks, dataset.crops if dataset.random_crop else 1),
        "held_out_pictures": measured,
        "compared": held_out_pictures(config) or [fitted.picture for fitted in measured],
        "class_pictures": fit_pictures([s for s in class_samples if s.path.is_file()], resolution, step, None),
    }


def from_library(key: str, settings: dict) -> object:
    """What `settings`' `_target_` makes of the rest; a missing package or a wrong argument is an InputError.

    A partial is tried on a parameter of one number, so that a wrong argument shows before the base is loaded."""
    target = settings["_target_"]
    package = target.partition(".")[0]
    if find_spec(package) is None:
        hint = f': pip install "lora_lab[{EXTRAS[package]}]"' if package in EXTRAS else ""
        raise InputError(f"{key}: {target} needs the package {package}, which is not installed{hint}")
    try:
        get_class(target)
        made = instantiate(settings, _convert_="all")
        if settings.get("_partial_"):
            made([torch.nn.Parameter(torch.zeros(1))])
    except (ImportError, InstantiationException, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key}: {target} cannot be made ({reason}); see conf/{key} for what it takes") from error
    return made


def describe(plan: Plan, config: Config, folder: Path) -> str:
    """The plan as a person reads it before the run."""
    settings, sizes = config.stage, count_buckets(plan.pictures)
    batch = config.batch_size * settings.gradient_accumulation
    shown: dict[tuple[int, int], int] = {}  # in an epoch, by size
    for sample, fitted in zip(plan.samples, plan.pictures, strict=True):
        shown[fitted.picture.size] = shown.get(fitted.picture.size, 0) + sample.repeats
    batches = batches_per_epoch([[0] * count for count in shown.values()], config.batch_size)
    folders = ", ".join(
        f"{f.root}" + (f" ({f.repeats} times)" if f.repeats > 1 else "") for f in config.dataset.folders
    )
    epochs = config.steps * settings.gradient_accumulation / batches
    every = f"every {settings.validate_every} steps and " if settings.validate_every else ""
    lines = {
        "character": f"{config.trigger}, {len(plan.samples)} pictures in {folders}",
        "sizes": ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.items()),
        "base": f"{config.model.base} on {plan.device} in {str(plan.dtype).removeprefix('torch.')}",
        "training": f"{config.steps} steps of {batch} ({epochs:.1f} epochs), rank {config.rank}, lr {config.rate:g}",
        "validation": f"{len(settings.prompts) * len(settings.seeds)} pictures {every}at the end",
        "writes": str(folder)
        if config.publish is False
        else f"{folder}, and the LoRA also to {MODELS / config.name}.safetensors",
    }
    if plan.start:
        lines["starts"] = f"with {plan.start}"
    if config.prior.kind != "none":
        lines["prior"] = describe_prior(plan, config)
    if config.loss.mask != "none":
        lines["masks"] = f"{config.loss.mask}; what is not white weighs {config.loss.unmasked_weight:g}"
    if settings.validation_loss_every:
        which = f"{len(plan.held_out)} pictures in {settings.validation_root}"
        if not plan.held_out:
            which = "the training pictures, which can be learnt by heart (stage.validation_root names others)"
        lines["its loss"] = f"at the start, every {settings.validation_loss_every} steps and at the end, of {which}"
    if settings.ema_decay:
        lines["saved"] = f"an average of the weights, of which a step keeps {settings.ema_decay:g}"
    if config.rate != config.lr:
        name = config.optimizer["_target_"].rpartition(".")[2]
        lines["optimizer"] = f"{name} with an lr of its own, {config.rate:g}; lr={config.lr:g} is not used"
    if plan.device.type == "cuda":
        lines["memory"] = memory_line(config, torch.cuda.mem_get_info(plan.device)[0] / 2**20)
    if config.dataset.random_crop:
        lines["crops"] = f"{sum(map(len, plan.crops))} of {len(plan.samples)} pictures"
    if config.dataset.shuffle_captions:
        lines["captions"] = f"{len({order for its in plan.texts for orders in its for order in orders})} orders"
    if config.text.learns:
        lines["text"] = text_encoders.describe_text(config)
    if plan.goes_on:
        lines["goes on"] = f"from {plan.goes_on}"
    return "\n".join(f"{name:>10}  {said}" for name, said in lines.items())


def describe_together(configs: dict[str, Config], plan: Plan, folder: Path) -> str:
    """The plan of jobs that train together, by their names; `plan` and `folder` are those of one of them."""
    lines = describe(plan, next(iter(configs.values())), folder).splitlines()
    kept = [line for line in lines if line.split()[0] in ("character", "sizes", "base", "memory")]
    each = [f"#{name} rank {c.rank}, lr {c.rate:g}, {c.steps} steps" for name, c in configs.items()]
    said = f"\n{'':>12}".join([f"{len(each)} jobs on one base", *each])
    return "\n".join([*kept, f"{'together':>10}  {said}"])


def describe_prior(plan: Plan, config: Config) -> str:
    prior, count = config.prior, len(plan.class_samples)
    of = f" of {prior.prompt!r}" if prior.prompt else ""
    if prior.kind == "prediction":
        what = f"what the base predicts where captions say {prior.class_noun} for {config.trigger}"
    elif prior.kind == "pictures":
        what = f"{count} class pictures{of} in {prior.root}"
    else:
        what = f"{count} class pictures{of}, {count - len(plan.class_pictures)} of them still to be drawn"
    return f"{what}; it weighs {prior.weight:g}"


def courses(configs: Sequence[Config]) -> list[list[int]]:
    """The numbers of the runs that are one course of training, the longest first and then its beginnings: the same but
    for the number of steps, under a schedule that does not depend on it, and from the same step on."""
    found: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        found.setdefault(_course(config, i), []).append(i)
    return [sorted(numbers, key=lambda i: -configs[i].steps) for numbers in found.values()]


def evenly(items: list[T], most: int) -> list[list[T]]:
    """`items` in as few parts as have at most `most` each, of about equal size."""
    count = -(-len(items) // most)
    return [items[len(items) * k // count : len(items) * (k + 1) // count] for k in range(count)]


def _course(config: Config, number: int) -> str:
    schedule = config.schedule
    if schedule.name not in ("constant", "constant_with_warmup") or 0 < schedule.warmup < 1:
        return f"{number}"
    stands = [path.name for path in checkpoints(Path(config.resume))[-1:]] if config.resume else []
    return repr(asdict(config) | {"steps": 0, "name": "", "publish": None, "tracker": None, "resume": stands})


def _newest_checkpoint(config: Config, folder: Path) -> Path | None:
    if not config.resume:
        return None
    found = checkpoints(folder)
    if not found:
        raise InputError(f"resume={config.resume}: {folder} has no checkpoint to go on from")
    if int(found[-1].name.removeprefix("step-")) > config.steps:
        raise InputError(f"resume={config.resume}: {found[-1].name} is beyond steps={config.steps}, ask for more steps")
    return found[-1]


def settled_optimizer(settings: dict, device: torch.device) -> dict:
    """The keys that are the optimizer's own, those that depend on the device decided."""
    _, settled = OptimizerTraits.split(settings)
    if settled.get("fused", False) is None:
        settled["fused"] = device.type == "cuda"
    return settled
