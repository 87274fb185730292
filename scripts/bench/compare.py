"""lorafit against a plain TRL script: the same losses, the time to the first step, the time a step.

Runs both in turn, several times, on the quickstart's model and rows (run scripts/quickstart first):

    .venv/bin/python scripts/bench/compare.py --rounds 3
    .venv/bin/python scripts/bench/compare.py --loss-on all     # every token is learned
    .venv/bin/python scripts/bench/compare.py --pairs sigmoid=1,sft=0.2    # DPO on the quickstart's pairs

On a GPU, and for other models (scripts/gpu_check does it), with rows that are plain text and learned whole:

    .venv/bin/python scripts/bench/compare.py --device cuda --model MODEL --text ROWS.jsonl --method qlora --packing

Exits with 1 if a loss differs by more than 1e-5, relatively (on a GPU, whose kernels differ, by 3%).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """One process: seconds from its start to the end of each step, and the losses."""

    ends: list[float]
    losses: list[float]

    @property
    def first(self) -> float:
        return self.ends[0]

    @property
    def step(self) -> float:
        """Median seconds a step, without the first."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def watch(command: list[str], metrics: Path, steps: int) -> Run:
    """Run a command and note when each line of its metrics appears."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ends: list[float] = []
    while process.poll() is None or len(ends) < steps:
        lines = metrics.read_text().count("\n") if metrics.is_file() else 0
        ends += [time.monotonic() - started] * (lines - len(ends))
        if process.poll() not in (None, 0):
            raise SystemExit(f"{command[1:3]} failed:\n{process.stderr.read().decode() if process.stderr else ''}")
        time.sleep(0.002)
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    return Run(ends, losses)


def run_trl(settings: dict[str, Any], folder: Path) -> Run:
    values = settings | {"metrics": str(folder / "trl.jsonl"), "output_dir": str(folder / "trl")}
    command = [sys.executable, str(ROOT / "scripts/bench/plain_trl.py"), json.dumps(values)]
    return watch(command, folder / "trl.jsonl", settings["max_steps"])


def run_lorafit(settings: dict[str, Any], folder: Path) -> Run:
    source = {"path": settings["data"]} | ({"format": "text"} if settings["text"] else {})
    cuda = settings["device"] == "cuda"
    changes = {
        "output_dir": folder / "run",
        "model.name_or_path": settings["model"],
        "model.dtype": "bfloat16" if cuda else "float32",
        "quantization": "{load_in_4bit: true}" if settings["method"] == "qlora" else "null",
        "dataset.train": json.dumps([source]),
        "dataset.audit": "{lost_tokens: null, duplicates: null}",
        "dataset.validation": "null",
        "dataset.loss_on": settings["loss_on"],
        "lora.lora_dropout": settings["dropout"],
        "training.num_train_epochs": "null",
        "training.max_steps": settings["max_steps"],
        "training.per_device_train_batch_size": settings["batch_size"],
        "training.gradient_accumulation_steps": settings["accumulation"],
        "training.learning_rate": settings["learning_rate"],
        "training.seed": settings["seed"],
        "training.max_length": settings["max_length"],
        "training.packing": str(settings["packing"]).lower(),
        "training.gradient_checkpointing": str(cuda).lower(),
        "training.optim": "adamw_torch_fused",
        "training.save_strategy": "no",
    }
    if settings["pairs"]:
        losses, weights = (list(part) for part in (settings["pairs"], settings["pairs"].values()))
        changes |= {
            "preference": json.dumps({"loss_type": losses, "loss_weights": weights}),
            "training.lr_scheduler_type": "linear",
        }
        changes.pop("quantization")
    if settings["kernels"]:
        changes |= {"model.use_kernels": settings["kernels"], "model.trust_remote_code": "true"}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    config = "configs/quickstart-dpo.yaml" if settings["pairs"] else "configs/quickstart.yaml"
    command = [sys.executable, "-m", "lorafit", "train", config, *words]
    return watch(command, folder / "run" / "metrics.jsonl", settings["max_steps"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--loss-on", choices=["assistant", "all"], default="assistant")
    parser.add_argument(
        "--pairs",
        metavar="LOSS=WEIGHT,…",
        type=lambda text: {name: float(weight) for name, weight in (one.split("=") for one in text.split(","))},
        help="pairs in place of rows, by TRL's losses",
    )
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--text", metavar="ROWS", help="rows of plain text, in place of the quickstart's")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument(
        "--kernels", metavar="YAML", help="lorafit's model.use_kernels: {RMSNorm: ORG/REPO@COMMIT:LAYER}"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    settings = {
        "model": arguments.model,
        "data": arguments.text or str(ROOT / "data" / "quickstart" / f"{'pairs-' * bool(arguments.pairs)}train.jsonl"),
        "pairs": arguments.pairs,
        "text": arguments.text is not None,
        "device": arguments.device,
        "method": arguments.method,
        "packing": arguments.packing,
        "kernels": arguments.kernels,
        "max_steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "accumulation": arguments.accumulation,
        "learning_rate": arguments.learning_rate,
        "seed": 1,
        "max_length": arguments.max_length,
        "dropout": 0.0 if arguments.pairs else arguments.dropout,
        "loss_on": "all" if arguments.text else arguments.loss_on,
    }
    pairs: list[tuple[Run, Run]] = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            pair = (run_trl(settings, Path(folder)), run_lorafit(settings, Path(folder)))
        pairs.append(pair)
        print(
            f"round {number + 1}: first step {pair[0].first:.2f} s (TRL) {pair[1].first:.2f} s (lorafit), "
            f"a step {pair[0].step:.2f} s {pair[1].step:.2f} s",
            flush=True,
        )
    worst = max(abs(a - b) / abs(a) for trl, ours in pairs for a, b in zip(trl.losses, ours.losses, strict=True))
    first = [statistics.median(run.first for run in side) for side in zip(*pairs, strict=True)]
    step = [statistics.median(run.step for run in side) for side in zip(*pairs, strict=True)]
    print(f"largest relative difference of a loss over {arguments.steps} steps: {worst:.1e}")
    print(f"process start to first step: TRL {first[0]:.2f} s, lorafit {first[1]:.2f} s ({first[0] / first[1]:.2f} x)")
    print(f"a step: TRL {step[0]:.2f} s, lorafit {step[1]:.2f} s ({step[0] / step[1]:.2f} x)")
    if arguments.json:
        figures = {
            "largest_difference": worst,
            "first_step_seconds": dict(zip(("trl", "lorafit"), first, strict=True)),
            "step_seconds": dict(zip(("trl", "lorafit"), step, strict=True)),
        }
        arguments.json.write_text(json.dumps(figures), encoding="utf-8")
    return 1 if worst > (3e-2 if arguments.device == "cuda" else 1e-5) else 0


if __name__ == "__main__":
    sys.exit(main())
