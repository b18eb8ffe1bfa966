"""What training costs at SDXL's size, preset by preset: one row per run of the program, as JSON and as Markdown.

python -m benchmarks OUT [--memory fast balanced] [--batch 1 4] [--steps 30] [--kernels] [--dry]
    [--also memory.capture=false ...]

The base has SDXL's published sizes and random weights, since speed and memory do not depend on the values; it is kept
in OUT. A row is a whole run with data, logging and checkpoint, without validation images, in a separate process.
--dry runs the same code on a CPU with narrow weights. Run it in a checkout."""

from dataclasses import replace

from benchmarks.command import make_parser, parse, run_main
from benchmarks.prepare import prepare
from benchmarks.row import Row, kernels, measure
from benchmarks.table import write_table
from benchmarks.work import training_flops


def main() -> None:
    parser = make_parser("benchmarks", __doc__)
    parser.add_argument("--memory", nargs="+", default=["balanced", "fast"], help="options of memory=")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kernels", action="store_true", help="measure the GPU's own time in a second run per row")
    options = parse(parser)
    bench = prepare(options.out, options.dry)
    flops = training_flops(bench.shape, bench.side)
    images = ("stage.prompts=['A {trigger}']", "sampler.steps=1")
    rows = []
    for memory in options.memory:
        for batch in options.batch:
            overrides = [*bench.overrides, *images, f"memory={memory}", f"batch_size={batch}", *options.also]
            folder = options.out / "runs" / f"{memory}-{batch}"
            rows.append(measure(folder, overrides, options.steps, flops * batch, bench.peak))
            if options.kernels:
                rows[-1] = replace(rows[-1], kernels=kernels(folder.with_name(f"{folder.name}-kernels"), overrides))
            write_table(options.out / "table", bench.machine, list(map(vars, rows)), HEAD, list(map(cells, rows)))


HEAD = (
    "run", "step ms, median (min to max)", "of it kernels", "images/s", "TFLOP/s", "MFU", "allocated MiB",
    "process MiB in training", "in the whole run", "to the first step",
)  # fmt: skip


def cells(row: Row) -> list:
    return [
        row.name, f"{row.median_ms:.1f} ({row.min_ms:.1f} to {row.max_ms:.1f}), {row.steps}",
        f"{row.kernels['kernel_ms']:.1f} in {row.kernels['kernels']}" if row.kernels else "",
        f"{row.images_per_second:.2f}", f"{row.tflops:.0f}", "" if row.mfu is None else f"{row.mfu:.0%}",
        f"{row.allocated_mib:.0f}", row.training_mib or "", row.process_mib or "",
        f"{row.seconds_to_first_step:.1f} s",
    ]  # fmt: skip


if __name__ == "__main__":
    run_main(main)
