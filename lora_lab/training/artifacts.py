"""What a run leaves behind as it goes: LoRA files and checkpoints, and in the end the published file."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from lora_lab.adapters.files import MODELS, keep_older, same_tensors, save_lora
from lora_lab.adapters.keys import kohya_state
from lora_lab.adapters.metadata import metadata, network_metadata
from lora_lab.adapters.tokens import TRIGGER, embeddings_path, save_tokens
from lora_lab.base.load import DTYPES, base_class
from lora_lab.console import say
from lora_lab.runs import write_atomically
from lora_lab.settings.schema import Config
from lora_lab.training.checkpoint import save_checkpoint
from lora_lab.training.loss import Objective
from lora_lab.training.plan import Plan
from lora_lab.training.step import Job
from lora_lab.training.text_encoders import text_metadata


@dataclass(frozen=True)
class RunArtifacts:
    """What a run leaves behind as it goes: LoRA files and checkpoints."""

    job: Job
    config: Config
    plan: Plan
    folder: Path

    def lora(self, step: int, name: str) -> Path:
        """The LoRA after `step` steps as lora/NAME.safetensors."""
        dtype = DTYPES[self.job.settings.save_dtype]
        file = self.folder / "lora" / f"{name}.safetensors"
        with self.job.finished():  # until it is written, for the state is no copy
            learnt = self.job.state()
            kind = base_class(self.config.model)
            state = kohya_state(self.job.adapted, kind.lora_key, values=learnt)
            network = network_metadata(self.plan.adapter, state, self.job.settings.lora_plus_ratio)
            network |= text_metadata(self.config.text, self.config.rate)
            notes = lora_metadata(self.config, self.plan, self.job.asked, step, network)
            if self.job.read and self.job.read.tokens:
                numbers = dict(zip(self.job.learnt.parameters, learnt.values(), strict=True))
                vectors = {key: numbers[tokens.vectors] for key, tokens in self.job.read.tokens.items()}
                save_tokens(embeddings_path(file), vectors, {"modelspec.title": name, TRIGGER: self.config.trigger})
            return save_lora(file, state, dtype, notes)

    def checkpoint(self, step: int) -> None:
        save_checkpoint(self.folder, step, self.job, self.plan.recipe)


def lora_metadata(
    config: Config, plan: Plan, objective: Objective, step: int, network: dict[str, str]
) -> dict[str, str]:
    """The metadata of the LoRA file after `step` steps towards `objective`."""
    prior = {"ss_prior_loss_weight": str(config.prior.weight), "ss_num_reg_images": str(len(plan.class_samples))}
    return ({} if config.prior.kind == "none" else prior) | metadata(
        name=config.name,
        base=config.model.base,
        trigger=config.trigger,
        network=network,
        lr=config.rate,
        steps=step,
        batch_size=config.batch_size,
        seed=config.seed,
        resolution=config.model.resolution,
        captions=[", ".join(orders[0] for orders in texts) for texts in plan.texts],
        loss=objective.settings,
        prediction=objective.schedule.prediction,
        kind_of_base=base_class(config.model).lora_metadata,
        dataset_hash=plan.hashes["dataset"],
        base_hash=plan.hashes["base"],
    )


def install_lora(lora: Path, name: str) -> Path:
    """Copy the finished file to models/lora/NAME.safetensors, and the embeddings beside it; another one that stands
    there is given a number."""
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS.with_name(".lora.lock")):  # two that finish at once would both take the same number
        return _install_lora(lora, MODELS / f"{name}.safetensors")


def _install_lora(lora: Path, target: Path) -> Path:
    files = {lora: target} | (
        {embeddings_path(lora): embeddings_path(target)} if embeddings_path(lora).is_file() else {}
    )
    if all(there.is_file() and same_tensors(there, file) for file, there in files.items()):
        return target  # a finished run was resumed
    older = keep_older(target)
    if older:
        say(f"{target} was there already; it is now {older}")
        if embeddings_path(target).is_file():
            embeddings_path(target).rename(embeddings_path(older))
    elif len(files) > 1:
        keep_older(embeddings_path(target))  # whose LoRA is gone
    for file, there in reversed(files.items()):
        write_atomically(there, partial(shutil.copyfile, file))
    return target
