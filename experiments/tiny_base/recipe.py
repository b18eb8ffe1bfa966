"""How much of everything: the sizes of the data and how long each model trains."""

from dataclasses import dataclass, replace

SEED = 1  # of every draw; training itself is cut off by the clock, so its last bits differ from run to run

BACKGROUNDS_EACH = 3  # every picture is put on so many backgrounds, each with its own captions
PIXELS = 128


@dataclass(frozen=True)
class Training:
    """seconds of training, what compiling costs included; rate is the highest learning rate, decay the average's."""

    seconds: float
    batch: int
    rate: float
    weight_decay: float = 0.01
    decay: float = 0.999


@dataclass(frozen=True)
class Recipe:
    avatars: int  # drawn by DiceBear
    characters: int  # drawn by us
    details: int  # pictures of small saturated things, for the VAE alone
    vae: Training
    unet: Training
    blip: Training
    clip: Training
    controlnet: Training


# One H100, 30 minutes in all, with two for drawing and four for compiling.
FULL = Recipe(
    avatars=40_000,
    characters=64_000,
    details=12_000,
    vae=Training(480, batch=32, rate=1e-3, weight_decay=1e-4),
    unet=Training(620, batch=256, rate=8e-4, decay=0.9997),
    blip=Training(210, batch=256, rate=1e-3, weight_decay=0.02),
    clip=Training(80, batch=1024, rate=1e-3, weight_decay=0.05),
    controlnet=Training(240, batch=128, rate=8e-4),
)

# Two minutes on a CPU: shows that every step works and what it leaves behind, not what it can do.
DRY = Recipe(
    avatars=100,
    characters=160,
    details=30,
    vae=Training(20, batch=4, rate=1e-3, weight_decay=1e-4, decay=0.9),
    unet=Training(20, batch=8, rate=8e-4, decay=0.9),
    blip=Training(10, batch=8, rate=1e-3, weight_decay=0.02, decay=0.9),
    clip=Training(8, batch=32, rate=1e-3, weight_decay=0.05, decay=0.9),
    controlnet=Training(10, batch=8, rate=8e-4, decay=0.9),
)


def shared(recipe: Recipe, share: float) -> Recipe:
    """`recipe` with a share of its pictures."""
    amounts = {name: round(getattr(recipe, name) * share) for name in ("avatars", "characters", "details")}
    return replace(recipe, **amounts)
