"""`lorafit bench`."""

from __future__ import annotations

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.options import BenchOptions, run_of


@command
def bench(options: BenchOptions) -> None:
    run_of(options.run).refuse_busy(shared=True)

    from lorafit.engine.bench.report import print_bench
    from lorafit.engine.bench.run import bench as run_bench

    report = run_bench(options)
    print_json(report.as_dict()) if options.as_json else print_bench(report)
