"""What a run leaves behind as it goes: LoRA files and checkpoints, and in the end the published file."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_lab.adapters.files import keep_older, kohya_state, metadata, network_notes, same_tensors, save_lora
from lora_lab.adapters.wear import MODELS
from lora_lab.base.load import DTYPES
from lora_lab.console import say
from lora_lab.runs import write_atomically
from lora_lab.schema import Config, Loss
from lora_lab.training.plan import Plan
from lora_lab.training.state import save_checkpoint
from lora_lab.training.step import Job


@dataclass(frozen=True)
class Keep:
    """What a run leaves behind as it goes: LoRA files and checkpoints."""

    job: Job
    config: Config
    plan: Plan
    folder: Path

    def lora(self, step: int, name: str) -> Path:
        """The LoRA after `step` steps as lora/NAME.safetensors."""
        dtype = DTYPES[self.job.settings.save_dtype]
        file = self.folder / "lora" / f"{name}.safetensors"
        with self.job.finished(), self.job.learnt.exact():  # until it is written, for the state is no copy
            state = kohya_state({"unet": self.job.unet})
            network = network_notes(self.plan.adapter, state, self.job.settings.lora_plus_ratio)
            notes = notes_for(self.config, self.plan, self.job.asked.settings, step, network)
            return save_lora(file, state, dtype, notes)

    def checkpoint(self, step: int) -> None:
        save_checkpoint(self.folder, step, self.job, self.plan.recipe)


def notes_for(config: Config, plan: Plan, loss: Loss, step: int, network: dict[str, str]) -> dict[str, str]:
    """The metadata of the LoRA file after `step` steps of the settled `loss`."""
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
        loss=loss,
        dataset_hash=plan.hashes["dataset"],
        base_hash=plan.hashes["base"],
    )


def publish(lora: Path, name: str) -> Path:
    """Copy the finished file to models/lora/NAME.safetensors; another one that stands there is given a number."""
    target = MODELS / f"{name}.safetensors"
    if target.is_file() and same_tensors(target, lora):  # a finished run was resumed
        return target
    older = keep_older(target)
    if older:
        say(f"{target} was there already; it is now {older}")
    return write_atomically(target, lambda file: shutil.copyfile(lora, file))
