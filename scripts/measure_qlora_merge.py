"""What merging a QLoRA adapter costs, measured: held-out loss, exact match, KL and top-1 agreement.

    python scripts/measure_qlora_merge.py runs/quickstart-qlora            # print the table
    python scripts/measure_qlora_merge.py runs/quickstart-qlora --docs docs/merging.md

The run is the quickstart's recipe on a 4-bit base:

    lorafit train configs/quickstart.yaml --set quantization.load_in_4bit=true --set output_dir=runs/quickstart-qlora

All models are run in float32 arithmetic on the same held-out rows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from lorafit.console import Console
from lorafit.engine import hush_progress
from lorafit.errors import LorafitError

BEGIN, END = "<!-- qlora -->\n", "<!-- /qlora -->"


def measured(run: Path, scratch: Path, console: Console) -> list[str]:
    """The table's lines."""
    from lorafit.engine.evaluate.batches import end_tokens, generate
    from lorafit.engine.evaluate.sets import as_question, held_out_rows
    from lorafit.engine.merge.exports import quantized_copy
    from lorafit.engine.merge.run import merge
    from lorafit.engine.merge.source import find_base, open_source
    from lorafit.engine.merge.verify import as_trained, load_merged, measure, rows_to_compare
    from lorafit.engine.model import load_adapter
    from lorafit.engine.tokenizer import load_tokenizer
    from lorafit.options import MergeOptions

    with open_source(run) as source:
        if source.plan is None or source.quantization is None:
            raise SystemExit(f"{run}: is no run on a quantized base")
        base, plan = find_base(source, None, False), source.plan
        tokenizer = load_tokenizer(plan, source.adapter)
        held = held_out_rows(plan, tokenizer, None)
        rows, _ = rows_to_compare(source, tokenizer, len(held))
        reference = measure(source, base, rows, "")

        def right(model: Any) -> float:
            questions = [question for row in held if (question := as_question(row, tokenizer))]
            prompts = [question.prompt for question in questions]
            ends = end_tokens(model, tokenizer, {question.end for question in questions})
            made = list(generate(model, prompts, ends, tokenizer.pad_token_id, 48))
            answers = {one.row: tokenizer.decode(one.ids, skip_special_tokens=True).strip() for one in made}
            hits = sum(answers[number] == question.expected for number, question in enumerate(questions))
            return float(hits / len(questions))

        adapter = load_adapter(as_trained(source, base), source.adapter)
        lines = [
            "| merged into | held-out loss | exact match | KL to the adapter on NF4 | top-1 agreement |",
            "|---|---|---|---|---|",
            f"| (adapter on NF4) | {reference.loss:.4f} | {right(adapter):.1%} | 0 | 100% |",
        ]
    del adapter
    for kind in ("dequantized", "original"):
        folder = merge(MergeOptions(run, ("merge.max_kl=1e9",), scratch / kind, base_weights=kind), console)
        for name, where in (
            (f"{kind} base", folder),
            (f"{kind} base, then NF4 again", quantized_copy(folder, "nf4")),
        ):
            model, _ = load_merged(where, None)
            model.config.use_cache = True
            found = reference.compare(model)
            lines.append(f"| {name} | {found.loss:.4f} | {right(model):.1%} | {found.kl:.2g} | {found.top1:.1%} |")
            del model
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--docs", type=Path, help="put the table between the markers of this file")
    asked = parser.parse_args()
    hush_progress()
    scratch = Path(tempfile.mkdtemp(prefix="lorafit-qlora-"))
    try:
        table = "\n".join(measured(asked.run, scratch, Console(stderr=True))) + "\n"
    except LorafitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(scratch)
    print(table)
    if asked.docs:
        before, _, rest = asked.docs.read_text(encoding="utf-8").partition(BEGIN)
        asked.docs.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
