"""What a run writes as it goes: checkpoints, LoRA files, and in the end the copy in models/lora."""

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
from lora_lab.training.checkpoint import save_checkpoint
from lora_lab.training.lora_training import LoRATraining
from lora_lab.training.observer import Observer
from lora_lab.training.resolve import ResolvedTraining
from lora_lab.training.text_encoders import text_metadata


@dataclass
class RunArtifacts(Observer):
    """Writes checkpoints every stage.checkpoint_every steps and at the end; then the finished LoRA, also installed."""

    resolved: ResolvedTraining
    training: LoRATraining
    lora: Path | None = None  # the finished file
    installed: Path | None = None  # its copy in models/lora

    def on_step(self, step: int) -> None:
        """Write a checkpoint where one is due."""
        if self.resolved.is_due(self.resolved.settings.checkpoint_every, step):
            self.save_checkpoint(step)

    def on_end(self, step: int) -> None:
        """Write the last checkpoint, the finished LoRA and its copy."""
        self.save_checkpoint(step)
        self.lora = self.save_lora(step, self.resolved.name)
        if self.resolved.install:
            self.installed = install_lora(self.lora, self.resolved.name)

    def save_checkpoint(self, step: int) -> None:
        """Write checkpoints/step-NNNNNN."""
        save_checkpoint(self.resolved.folder, step, self.training, self.resolved.fingerprint)

    def save_lora(self, step: int, name: str) -> Path:
        """Write the LoRA after `step` steps as lora/`name`.safetensors, and new tokens' embeddings beside it."""
        resolved, training = self.resolved, self.training
        file = resolved.folder / "lora" / f"{name}.safetensors"
        with training.swap_in_saved_weights():  # until the file is written: on a CPU the weights are views
            weights = training.weights()
            state = kohya_state(training.adapted_components, base_class(resolved.model).lora_key, values=weights)
            network = network_metadata(resolved.adapter, state, resolved.settings.lora_plus_ratio)
            network |= text_metadata(resolved.text, resolved.lr)
            tokens = training.text_encoders.tokens if training.text_encoders else {}
            if tokens:
                by_parameter = dict(zip(training.params.params, weights.values(), strict=True))
                vectors = {key: by_parameter[new.vectors] for key, new in tokens.items()}
                save_tokens(embeddings_path(file), vectors, {"modelspec.title": name, TRIGGER: resolved.trigger})
            return save_lora(
                file,
                state,
                DTYPES[resolved.settings.save_dtype],
                lora_metadata(resolved, training, step, network),
            )


def lora_metadata(
    resolved: ResolvedTraining, training: LoRATraining, step: int, network: dict[str, str]
) -> dict[str, str]:
    """The metadata of the LoRA file after `step` steps; `network` describes the adapter."""
    prior = {}
    if resolved.prior.kind != "none":
        prior["ss_prior_loss_weight"] = str(resolved.prior.weight)
        prior["ss_num_reg_images"] = str(len(resolved.files.class_samples))
    return prior | metadata(
        name=resolved.name,
        base=resolved.model.base,
        trigger=resolved.trigger,
        network=network,
        lr=resolved.lr,
        steps=step,
        batch_size=resolved.batch_size,
        seed=resolved.seed,
        resolution=resolved.model.resolution,
        captions=[", ".join(variants[0] for variants in captions) for captions in resolved.files.texts],
        loss=training.objective.settings,
        prediction=training.objective.schedule.prediction,
        kind_of_base=base_class(resolved.model).lora_metadata,
        dataset_hash=resolved.hashes["dataset"],
        base_hash=resolved.hashes["base"],
    )


def install_lora(lora: Path, name: str) -> Path:
    """Copy a finished file to models/lora/`name`.safetensors, and the embeddings beside it; a different file of that
    name is kept under a number."""
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS.with_name(".lora.lock")):  # two runs that finish at once would take the same number
        return _install_lora(lora, MODELS / f"{name}.safetensors")


def _install_lora(lora: Path, target: Path) -> Path:
    copies = {lora: target}
    if embeddings_path(lora).is_file():
        copies[embeddings_path(lora)] = embeddings_path(target)
    if all(copy.is_file() and same_tensors(copy, file) for file, copy in copies.items()):
        return target  # a finished run was resumed
    older = keep_older(target)
    if older:
        say(f"{target} was there already; it is now {older}")
        if embeddings_path(target).is_file():
            embeddings_path(target).rename(embeddings_path(older))
    elif len(copies) > 1:
        keep_older(embeddings_path(target))  # its LoRA is gone
    for file, copy in reversed(copies.items()):
        write_atomically(copy, partial(shutil.copyfile, file))
    return target
