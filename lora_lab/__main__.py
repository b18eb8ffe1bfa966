"""python -m lora_lab stage=train lr=1e-4

Imports nothing heavy: a wrong command line is answered in half a second."""

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab import command_line, config
from lora_lab.errors import InputError, RunError


@hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    from lora_lab.stages import run

    run(config.typed(cfg), Path(HydraConfig.get().runtime.output_dir))


def cli() -> None:
    """Exit codes: 0 done, 2 wrong input or configuration (one sentence on stderr), 1 anything else."""
    sys.exit(_exit_code(sys.argv[1:]))


def _exit_code(argv: list[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the sentence is ours
    OmegaConf.register_new_resolver("lora_lab_help", command_line.help_text, replace=True)
    config.register()
    try:
        given = command_line.arguments(argv)
        overrides = command_line.resumed(given.overrides)
        if not (given.help or given.hydra_help or given.shell_completion):
            command_line.check(overrides, given.multirun)
        if overrides != given.overrides:
            sys.argv[1:] = [a for a in argv if a not in given.overrides] + overrides
        main()
    except InputError as error:
        print(f"lora_lab: {error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        print(f"lora_lab: {command_line.explain(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"lora_lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"\nlora_lab: {interrupt}" if str(interrupt) else "\nlora_lab: stopped", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    cli()
