"""What training costs at SDXL's size, preset by preset: one row a run of the program itself, as JSON and as Markdown.

python -m benchmarks OUT [--memory fast balanced] [--batch 1 4] [--steps 30] [--kernels] [--dry]
    [--also memory.capture=false ...]

The base has SDXL's published sizes and random weights, since speed and memory do not depend on the values; OUT keeps it
for the next time. A row is a whole run with data, logging and checkpoint, in a process of its own, without pictures.
--dry goes the same way on a CPU with weights a few numbers wide. Run it in a checkout."""

from dataclasses import replace

from benchmarks.command import carry_out, parsed, parser_of
from benchmarks.prepare import prepare
from benchmarks.row import Row, kernels, measure
from benchmarks.table import write_table
from benchmarks.work import training_flops


def main() -> None:
    parser = parser_of("benchmarks", __doc__)
    parser.add_argument("--memory", nargs="+", default=["balanced", "fast"], help="options of memory=")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kernels", action="store_true", help="a second run for each row counts the GPU's own time")
    asked = parsed(parser)
    bench = prepare(asked.out, asked.dry)
    flops = training_flops(bench.shape, bench.side)
    drawn = ("stage.prompts=['A {trigger}']", "sampler.steps=1")
    rows = []
    for memory in asked.memory:
        for batch in asked.batch:
            overrides = [*bench.overrides, *drawn, f"memory={memory}", f"batch_size={batch}", *asked.also]
            folder = asked.out / "runs" / f"{memory}-{batch}"
            rows.append(measure(folder, overrides, asked.steps, flops * batch, bench.peak))
            if asked.kernels:
                rows[-1] = replace(rows[-1], kernels=kernels(folder.with_name(f"{folder.name}-kernels"), overrides))
            write_table(asked.out / "table", bench.machine, list(map(vars, rows)), HEAD, list(map(cells, rows)))


HEAD = (
    "run", "step ms, median (least to most)", "of it kernels", "images/s", "TFLOP/s", "MFU", "allocated MiB",
    "process MiB in training", "in the whole run", "to the first step",
)  # fmt: skip


def cells(row: Row) -> list:
    return [
        row.name, f"{row.median_ms:.1f} ({row.least_ms:.1f} to {row.most_ms:.1f}), {row.steps}",
        f"{row.kernels['kernel_ms']:.1f} in {row.kernels['kernels']}" if row.kernels else "",
        f"{row.images_per_second:.2f}", f"{row.tflops:.0f}", "" if row.mfu is None else f"{row.mfu:.0%}",
        f"{row.allocated_mib:.0f}", row.training_mib or "", row.process_mib or "",
        f"{row.seconds_to_first_step:.1f} s",
    ]  # fmt: skip


if __name__ == "__main__":
    carry_out(main)
