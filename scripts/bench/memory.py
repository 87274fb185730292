"""Memory of a training on a CPU: what is resident at its peak against what was predicted, for several set-ups.

    python scripts/bench/memory.py                  # needs models/SmolLM2-135M-Instruct; some 20 minutes on two cores
    python scripts/bench/memory.py qlora packed     # these alone
    python scripts/bench/memory.py lora --short     # as where memory is short: large blocks returned at once

Each set-up is trained for some steps by `lorafit train` in a process of its own, and read by `lorafit estimate-vram
--calibrate`. docs/vram.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH, LENGTH = "training.per_device_train_batch_size", "training.max_length"
SETUPS: dict[str, list[str]] = {
    "lora": [f"{BATCH}=4", f"{LENGTH}=256"],
    "one-row": [f"{BATCH}=1", f"{LENGTH}=1024"],
    "qlora": [f"{BATCH}=4", f"{LENGTH}=256", "quantization.load_in_4bit=true"],
    "qlora-small": [f"{BATCH}=2", f"{LENGTH}=256", "quantization.load_in_4bit=true"],
    "dora": [f"{BATCH}=2", f"{LENGTH}=256", "lora.use_dora=true"],
    "full": [f"{BATCH}=2", f"{LENGTH}=256", "lora=null", "training.learning_rate=1e-5"],
    "packed": [f"{BATCH}=2", f"{LENGTH}=512", "training.packing=true"],
    "accumulated": [f"{BATCH}=2", f"{LENGTH}=512", "training.gradient_accumulation_steps=4"],
    "no-dropout": [f"{BATCH}=8", f"{LENGTH}=256", "lora.lora_dropout=0"],
    "checkpointing": [f"{BATCH}=8", f"{LENGTH}=512", "training.gradient_checkpointing=true"],
    "bfloat16": [f"{BATCH}=4", f"{LENGTH}=128", "model.dtype=bfloat16"],
    "validated": [f"{BATCH}=4", f"{LENGTH}=256", "dataset.validation=0.05", "training.eval_strategy=steps",
                  "training.eval_steps=2", "lora={r: 64, target_modules: [q_proj, v_proj]}"],
}  # fmt: skip
RECIPE = """
model: {{name_or_path: {model}, dtype: float32}}
lora: {{}}
dataset: {{train: [{{path: {rows}, format: text}}], audit: {{lost_tokens: null}}}}
training: {{gradient_accumulation_steps: 1, max_steps: {steps}, save_strategy: "no"}}
hardware: {{device: cpu}}
output_dir: {out}
"""
SHORT = "import sys, lorafit.run.memory as c; c.available_memory = lambda: 1; from lorafit.cli import app; app()"
"""The command on a machine that seems to have no memory free."""


def make_rows(file: Path) -> None:
    """Rows of 100 to 2,000 words, the same each time."""
    draw = random.Random(0)
    words = [
        f"{a}{b}" for a in ("re", "un", "over", "out", "fore") for b in ("see", "take", "come", "go", "hold", "set")
    ]
    texts = (" ".join(draw.choices(words, k=draw.randint(100, 2000))) for _ in range(200))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setups", nargs="*", help=f"of {', '.join(SETUPS)}; all without")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    unknown = set(options.setups) - set(SETUPS)
    if unknown:
        parser.error(f"no such set-ups: {', '.join(sorted(unknown))}")
    start = [sys.executable, "-c", SHORT] if options.short else [sys.executable, "-m", "lorafit"]
    with tempfile.TemporaryDirectory() as folder:
        rows, recipe = Path(folder, "rows.jsonl"), Path(folder, "recipe.yaml")
        make_rows(rows)
        command = [sys.executable, "-m", "lorafit", "estimate-vram"]
        for name in options.setups or SETUPS:
            out = Path(folder, name)
            recipe.write_text(
                RECIPE.format(model=Path(options.model).resolve(), rows=rows, steps=options.steps, out=out),
                encoding="utf-8",
            )
            settings = [word for setting in SETUPS[name] for word in ("--set", setting)]
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))}
            subprocess.run([*start, "train", str(recipe), *settings], check=True, env=environment)
            command += ["--calibrate", str(out)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
