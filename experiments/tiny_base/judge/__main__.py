"""How often the judge reads true drawings rightly: python -m experiments.tiny_base.judge --calibrate 200"""

import argparse

from experiments.tiny_base.judge.calibration import calibrate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base.judge", description=__doc__.split(":")[0])
    parser.add_argument("--calibrate", type=int, required=True, metavar="COUNT", help="how many drawings to read")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    calibrate(asked.calibrate, asked.seed)


if __name__ == "__main__":
    main()
