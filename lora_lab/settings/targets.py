"""Objects of other libraries that conf/ names by `_target_`: adapters, optimizers, captioners, refiners."""

from importlib.util import find_spec
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate

from lora_lab.errors import InputError

# Optional packages and the extra in pyproject.toml that installs them.
EXTRAS = {"prodigyopt": "optimizers", "schedulefree": "optimizers", "pytorch_optimizer": "optimizers"}


def instantiate_target(key: str, settings: dict[str, Any], *probe: object) -> Any:
    """What `settings["_target_"]` makes of the other settings; `key` is their group in conf/.

    With `_partial_` that is a function; it is called once with `probe`, so that a wrong argument shows before work
    begins. Raises InputError for a missing package or a wrong argument."""
    target = settings["_target_"]
    package = target.partition(".")[0]
    if find_spec(package) is None:
        hint = f': pip install "lora_lab[{EXTRAS[package]}]"' if package in EXTRAS else ""
        raise InputError(f"{key}: {target} needs the package {package}, which is not installed{hint}")
    try:
        get_class(target)
        made = instantiate(settings, _convert_="all")
        if settings.get("_partial_"):
            made(*probe)
    except (ImportError, InstantiationException, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key}: {target} cannot be created ({reason}); conf/{key} shows its arguments") from error
    return made
