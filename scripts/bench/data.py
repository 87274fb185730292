"""Preparing data: lorafit against TRL, cold against warm, and memory by the number of rows.

    .venv/bin/python scripts/bench/data.py ratio          # 100,000 rows, both
    .venv/bin/python scripts/bench/data.py audit          # the audit's share of tokenizing
    .venv/bin/python scripts/bench/data.py memory         # 10,000, 100,000 and 1,000,000 rows
    .venv/bin/python scripts/bench/data.py warm           # a second start with and without data

Rows are made up (seeded words in alpaca's shape). The tokenizer is the quickstart's, the chat template
TRL's qwen2_5 (the model's own has no training version, which TRL needs to mask). Every figure is of a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TEMPLATE = "qwen2_5"


def write_rows(file: Path, count: int) -> None:
    """Alpaca-like rows: an instruction of 5 to 30 words, an input in a third of them, an answer of 10 to 100."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucm", k=draw.randint(2, 6))) for _ in range(5000)]

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            row = {"instruction": some(5, 30), "input": some(5, 40) if draw.random() < 1 / 3 else ""}
            stream.write(json.dumps(row | {"output": some(10, 100)}) + "\n")


def plan_for(file: Path, folder: Path) -> Any:
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe

    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {MODEL}, chat_template: {TEMPLATE}}}\nlora: {{}}\n"
        f"dataset: {{train: [{{path: {file}}}]}}\ntraining: {{max_length: 1024}}\n"
    )
    return plan_recipe(Recipe.load(recipe), recipe, count_rows=False)


def lorafit_prepares(file: Path, folder: Path) -> dict[str, Any]:

    from lorafit.engine.data.prepare import prepare
    from lorafit.engine.tokenizer import load_tokenizer

    plan = plan_for(file, folder)
    tokenizer = load_tokenizer(plan)
    memory_watch = Watch()
    before = memory_watch.peak_mib
    began = time.monotonic()
    data = prepare(plan_for(file, folder).data, tokenizer)
    seconds = time.monotonic() - began
    return {
        "seconds": seconds,
        "rows": len(data.train),
        "tokens": data.audit.training_rows.tokens,
        "learned": data.audit.training_rows.supervised_tokens,
        "before_mib": before,
        "peak_mib": memory_watch.stop(),
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Watch(threading.Thread):
    """The peak of this process's own memory (anonymous pages), looked at 50 times a second.

    Pages of files that are mapped or cached are the kernel's to give and take; they are in the resident size.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib = self.now()
        self.done = threading.Event()
        self.start()

    @staticmethod
    def now() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.peak_mib = max(self.peak_mib, self.now())

    def stop(self) -> float:
        self.done.set()
        return self.peak_mib


def without_audit(file: Path, folder: Path) -> dict[str, Any]:
    """The same without what only the audit needs: looking into contents, hashing rows, comparing them."""
    import lorafit.engine  # before the libraries that it quietens
    import lorafit.engine.data.prepare
    from lorafit.engine.data.encode import _Encoder
    from lorafit.engine.data.render import Renderer

    def nothing(*_: Any) -> Any:
        return None

    class Unhashed:
        def digest(self) -> bytes:
            return bytes(8)

    Renderer._remarks = lambda *_: {}  # type: ignore[method-assign]
    _Encoder._check_start = nothing  # type: ignore[method-assign]
    lorafit.engine.data.encode.hashlib.blake2b = lambda *_, **__: Unhashed()  # type: ignore[assignment,misc]
    lorafit.engine.data.prepare.duplicates = lorafit.engine.data.prepare.leaked = nothing  # type: ignore[assignment]
    return lorafit_prepares(file, folder)


def trl_prepares(file: Path, folder: Path) -> dict[str, Any]:
    """What SFTTrainer does with the same rows as messages, from reading the file to labels."""

    import datasets
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    import trl

    tokenizer.chat_template = (Path(trl.__file__).parent / f"chat_templates/{TEMPLATE}.jinja").read_text()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    began = time.monotonic()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))

    def as_messages(row: dict[str, Any]) -> dict[str, Any]:
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}

    rows = rows.map(as_messages, remove_columns=rows.column_names)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(folder / "out"),
            assistant_only_loss=True,
            max_length=1024,
            use_cpu=True,
            bf16=False,
            report_to=[],
            dataset_num_proc=int(os.environ.get("BENCH_PROCESSES", "0")) or None,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    seconds = time.monotonic() - began
    sample = trainer.train_dataset
    return {"seconds": seconds, "rows": len(sample)}


def apart(what: str, file: Path, folder: Path, **environment: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--one", what, str(file), str(folder)]
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")} | environment
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ratio(folder: Path, count: int) -> None:
    file = folder / "rows.jsonl"
    write_rows(file, count)
    print(f"{count:,} rows, {file.stat().st_size / 1e6:.0f} MB")
    ours = apart("lorafit", file, folder / "ours")
    print(f"lorafit            {ours['seconds']:7.1f} s  ({ours['tokens']:,} tokens, {ours['learned']:,} learned)")
    warm = apart("lorafit", file, folder / "ours")
    print(f"lorafit, cached    {warm['seconds']:7.2f} s")
    for processes in ("0", "2"):
        theirs = apart("trl", file, folder / f"trl{processes}", BENCH_PROCESSES=processes)
        name = "TRL" if processes == "0" else f"TRL, {processes} processes"
        print(f"{name:18} {theirs['seconds']:7.1f} s  ({theirs['seconds'] / ours['seconds']:.1f} times lorafit's)")


def audit(folder: Path, count: int, rounds: int = 3) -> None:
    file = folder / "rows.jsonl"
    write_rows(file, count)
    seconds: dict[str, list[float]] = {"lorafit": [], "without_audit": []}
    for turn in range(rounds):
        for what in seconds:
            seconds[what].append(apart(what, file, folder / f"{what}{turn}")["seconds"])
    with_audit, without = (min(found) for found in seconds.values())
    print(
        f"{count:,} rows: {with_audit:.2f} s with the audit, {without:.2f} s without ({with_audit / without - 1:+.1%})"
    )


def warm(folder: Path, count: int) -> None:
    """From the start of `lorafit train` to the first step, with few rows and with many in the cache."""
    for name, rows in (("few", 100), ("many", count)):
        file = folder / f"{name}.jsonl"
        write_rows(file, rows)
        recipe = folder / f"{name}.yaml"
        recipe.write_text(
            f"model: {{name_or_path: {MODEL}, chat_template: {TEMPLATE}}}\nlora: {{}}\n"
            f"dataset: {{train: [{{path: {file}}}]}}\n"
            "training: {max_length: 1024, max_steps: 1, per_device_train_batch_size: 1, global_batch_size: 1}\n"
            f"output_dir: {folder / name}\n"
        )
        settings = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        command = [sys.executable, "-m", "lorafit", "train", str(recipe), "--overwrite"]
        seconds = []
        for _ in range(4):  # the first fills the cache
            began = time.monotonic()
            subprocess.run(command, env=settings, capture_output=True, check=True)
            seconds.append(time.monotonic() - began)
        print(f"{rows:9,} rows: {seconds[0]:.1f} s cold, {min(seconds[1:]):.1f} s with a warm cache (one step, saved)")


def memory(folder: Path, counts: tuple[int, ...] = (10_000, 100_000, 1_000_000)) -> None:
    for count in counts:
        file = folder / f"rows{count}.jsonl"
        write_rows(file, count)
        found = apart("lorafit", file, folder / str(count))
        own, imports, resident = found["peak_mib"], found["before_mib"], found["resident_mib"]
        print(
            f"{count:9,} rows: {own:.0f} MiB of its own at most ({own - imports:.0f} more than the libraries alone), "
            f"{resident:.0f} MiB resident with files, {found['seconds']:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["ratio", "audit", "memory", "warm"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, file, folder = arguments.one
        measure = {"lorafit": lorafit_prepares, "without_audit": without_audit, "trl": trl_prepares}[what]
        print(json.dumps(measure(Path(file), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "memory":
            memory(Path(folder))
        else:
            {"audit": audit, "warm": warm}.get(arguments.what, ratio)(Path(folder), arguments.rows)


if __name__ == "__main__":
    main()
