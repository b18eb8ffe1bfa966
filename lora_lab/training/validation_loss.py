"""The validation loss: that of fixed images under fixed noise, by which the curves of two runs can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_lab.track.base import Track
from lora_lab.training.data import Example, TrainingData
from lora_lab.training.lora_training import LoRATraining
from lora_lab.training.loss import Batch, per_sample_loss
from lora_lab.training.metrics import MetricsFile
from lora_lab.training.observer import Observer
from lora_lab.training.randomness import generator


@dataclass
class ValidationLoss(Observer):
    """Measures the validation loss at the start, every stage.validation_loss_every steps, and at the end."""

    training: LoRATraining
    data: TrainingData
    file: MetricsFile
    tracker: Track

    def on_start(self, step: int) -> None:
        """Measure the base, or what was due at `step` when the run stopped."""
        if step == 0 or step % self.training.settings.validation_loss_every == 0:
            self._measure(step)

    def on_step(self, step: int) -> None:
        """Measure where that is due."""
        if step % self.training.settings.validation_loss_every == 0:
            self._measure(step)

    def on_end(self, step: int) -> None:
        """Measure the finished LoRA."""
        self._measure(step)

    def _measure(self, step: int) -> None:
        if step in self.file.steps:
            return
        loss = validation_loss(self.training, self.data, self.training.settings.validation_timesteps)
        self.file.write(step, {"loss": loss})
        self.tracker.numbers(step, {"validation/loss": loss})


@torch.no_grad()
def validation_loss(training: LoRATraining, data: TrainingData, timesteps: Sequence[int]) -> float:
    """The mean squared error of the prediction over all images of `data` at all `timesteps`, equally weighted.

    It is measured with the weights that would be saved, without dropout, flips and masks, and changes nothing in the
    training. The noise depends on image and timestep alone, so runs of another seed or loss are measured alike."""
    squared = replace(training.objective, settings=replace(training.objective.settings, type="l2"))
    total = torch.zeros((), device=training.params.master.device)
    training.train(False)
    # Eagerly: compiled blocks would be compiled again for evaluation mode.
    with training.swap_in_saved_weights(), torch.compiler.set_stance("force_eager"):
        for example in data.examples:
            for start in range(0, len(timesteps), training.batch_size):
                batch = _batch(example, timesteps[start : start + training.batch_size])
                if training.text_encoders is not None:
                    batch = training.text_encoders(batch)
                total += per_sample_loss(training.network, squared, batch).sum()
    return total.item() / (len(data.examples) * len(timesteps))


def _batch(example: Example, timesteps: Sequence[int]) -> Batch:
    """The first view and caption of one image at each of B `timesteps`."""
    view, text, count = example.crops[0][0], example.texts[0][0], len(timesteps)
    latents = view.latents
    noise = [torch.randn(latents.shape, generator=generator("validation", example.name, t)) for t in timesteps]
    ones = torch.ones(count, device=latents.device)
    return Batch(
        latents=latents.expand(count, *latents.shape),
        noise=torch.stack(noise).to(latents.device),
        timesteps=torch.tensor(timesteps, device=latents.device),
        conditioning={name: v.expand(count, *v.shape) for name, v in (text | view.conditioning).items()},
        loss_weights=ones,
        huber_delta=ones,  # squares do not use it
    )
