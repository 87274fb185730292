"""`lorafit eval`."""

from __future__ import annotations

import typer

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import GateError
from lorafit.options import EvalOptions, run_of


@command
def eval(options: EvalOptions) -> None:
    from lorafit.files import refuse_busy

    run = run_of(options.path)
    if options.locked:
        from lorafit.lock import check_run

        check_run(run)
    run.refuse_busy(shared=True)
    refuse_busy(options.destination(run))

    from lorafit.engine.evaluate.run import evaluate
    from lorafit.evaluation.report.html import read_samples
    from lorafit.evaluation.report.text import print_results

    results, folder = evaluate(options)
    if options.as_json:
        print_json(results.model_dump(mode="json"))
    else:
        print_results(results, list(read_samples(folder, options.show_rows)))
        typer.echo(str(folder / results.files["html"]))
    if results.failed:
        raise GateError("\n".join(f"{gate.where}: {gate.gate}: {gate.sentence}" for gate in results.failed))
