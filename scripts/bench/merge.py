"""Merging: lorafit's streaming merge against PEFT's load + merge + save, time and memory, in turn.

    python scripts/bench/merge.py smollm2              # needs models/SmolLM2-135M-Instruct
    python scripts/bench/merge.py 1.5b                 # a random model of 3 GB, made and deleted
    python scripts/bench/merge.py 8b --only lorafit    # a random Llama-3-8B-shaped model of 16 GB

Each merge runs in a process of its own, which reports wall time after its imports and the peak of anonymous
memory (RssAnon of /proc/self/status, every 5 ms) above what the imports take. PEFT's files are flushed to the disk as
lorafit's are; its time without that is given as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 64000, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
SHARD = 5_000_000_000


def make_base(name: str, folder: Path) -> Path:
    """A random Llama of a shape in bfloat16, written tensor by tensor."""
    if name == "smollm2":
        return Path("models/SmolLM2-135M-Instruct")
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[name], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    pending: dict[str, Any] = {}
    files: list[list[str]] = []
    size, total = 0, 0
    names = [key for key in model.state_dict() if not (key == "lm_head.weight" and config.tie_word_embeddings)]
    for key in names:
        tensor = torch.empty(model.state_dict()[key].shape, dtype=torch.bfloat16).normal_(0, 0.02)
        pending[key] = tensor
        size += tensor.numel() * 2
        total += tensor.numel() * 2
        if size >= SHARD or key == names[-1]:
            save_file(pending, folder / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
            files.append(list(pending))
            pending, size = {}, 0
    places = {}
    for number, keys in enumerate(files):
        final = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        places |= dict.fromkeys(keys, final)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(base: Path, folder: Path, r: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model.name_or_path = str(base.resolve())
    kind = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.device("meta"):
        peft = get_peft_model(model, LoraConfig(**kind))
    torch.manual_seed(0)
    for name, parameter in list(peft.named_parameters()):
        if "lora_" in name:
            owner = peft.get_submodule(name.rpartition(".")[0])
            value = torch.empty(parameter.shape).normal_(0, 0.02)
            owner.weight = torch.nn.Parameter(value)
    peft.save_pretrained(folder)


class Meter(threading.Thread):
    """The peak of anonymous memory above the start, in bytes, and the seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.peak = self.now()
        self.began = time.perf_counter()
        self.over = threading.Event()
        self.start()

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise SystemExit("this system has no RssAnon in /proc/self/status")

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.peak = max(self.peak, self.now())

    def result(self, **more: Any) -> str:
        seconds = time.perf_counter() - self.began
        self.over.set()
        return json.dumps({"seconds": round(seconds, 2), "peak_mib": round((self.peak - self.first) / 2**20, 1)} | more)


def with_lorafit(base: Path, adapter: Path, output: Path, verify: str) -> str:
    from rich.console import Console

    from lorafit.engine.merge.run import merge
    from lorafit.options import MergeOptions

    meter = Meter()
    merge(MergeOptions(adapter, output=output, base=str(base), verify=verify, overwrite=True), Console(stderr=True))  # type: ignore[arg-type]
    return meter.result()


def with_peft(base: Path, adapter: Path, output: Path) -> str:
    import warnings

    warnings.simplefilter("ignore")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    meter = Meter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(output)
    unflushed = round(time.perf_counter() - meter.began, 2)
    for file in output.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return meter.result(seconds_unflushed=unflushed)


def same(one: Path, other: Path) -> str:
    """How many tensors of two folders differ."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Path]:
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        return found

    mine, its = tensors(one), tensors(other)
    if mine.keys() != its.keys():
        return f"keys differ: {sorted(mine.keys() ^ its.keys())[:3]}"
    different = 0
    for key in mine:
        with safe_open(mine[key], "pt") as first, safe_open(its[key], "pt") as second:
            different += not torch.equal(first.get_tensor(key), second.get_tensor(key))
    return f"{different} of {len(mine)} tensors differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", *SHAPES])
    parser.add_argument("-r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["lorafit", "peft"])
    parser.add_argument("--verify", default="weights", choices=["weights", "none"])
    parser.add_argument("--keep", type=Path, help="keep base and adapter here, and use them again")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # who, base, adapter, output
    asked = parser.parse_args()
    if asked.one:
        who, *paths = asked.one
        base, adapter, output = map(Path, paths)
        print(with_peft(base, adapter, output) if who == "peft" else with_lorafit(base, adapter, output, asked.verify))
        return
    scratch = asked.keep or Path(tempfile.mkdtemp(prefix="lorafit-bench-"))
    try:
        base = scratch / asked.model
        base = base if base.exists() else make_base(asked.model, base)
        adapter = scratch / f"{asked.model}-adapter"
        if not adapter.exists():
            make_adapter(base, adapter, asked.r)
        for number in range(asked.rounds):
            outputs = []
            for who in ["lorafit", "peft"]:
                if asked.only not in (None, who):
                    continue
                output = scratch / f"out-{who}"
                shutil.rmtree(output, ignore_errors=True)
                command = [sys.executable, __file__, asked.model, "--verify", asked.verify, "--one", who]
                done = subprocess.run(
                    [*command, str(base), str(adapter), str(output)], stdout=subprocess.PIPE, text=True, check=True
                )
                print(f"round {number + 1}  {who:8}  {done.stdout.strip()}", flush=True)
                outputs.append(output)
            if len(outputs) == 2 and number == 0:
                print(same(*outputs))
            for output in outputs:
                shutil.rmtree(output)
    finally:
        if asked.keep is None:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
