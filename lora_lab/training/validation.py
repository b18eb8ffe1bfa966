"""The loss of fixed pictures under fixed noise: what two runs' curves can be compared by."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lora_lab.training.data import Example, TrainingData
from lora_lab.training.loss import Batch, per_sample_loss
from lora_lab.training.randomness import generator
from lora_lab.training.step import Job


@torch.no_grad()
def validation_loss(job: Job, data: TrainingData, timesteps: Sequence[int]) -> float:
    """The mean squared error of the UNet's prediction over all pictures of `data` at all `timesteps`, all alike.

    It is measured with the weights that would be saved, without dropout, flips and masks, and leaves no trace in the
    training. Noise depends on picture and timestep alone, so runs of another seed or loss have the same measure."""
    asked = replace(job.asked, settings=replace(job.asked.settings, type="l2"))
    total = torch.zeros((), device=job.learnt.master.device)
    job.mode(training=False)
    with job.finished(), torch.compiler.set_stance("force_eager"):  # it would be compiled for this as well
        for example in data.examples:
            for start in range(0, len(timesteps), job.batch_size):
                batch = _batch(example, timesteps[start : start + job.batch_size])
                if job.read is not None:
                    batch = job.read(batch)
                total += per_sample_loss(job.unet, asked, batch).sum()
    return total.item() / (len(data.examples) * len(timesteps))


def _batch(example: Example, timesteps: Sequence[int]) -> Batch:
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
        huber_delta=ones,  # of no meaning to squares
    )
