"""The heavy half: all that imports torch and what stands on it. Commands import it inside their functions.

Importing it keeps the libraries' own bars, notes and telemetry off the screen, and all GPUs but one out of sight where
no launcher has started several processes: the trainer would take them all.
"""

from __future__ import annotations

import logging
import os
import warnings

from lorafit.hardware import processes, visible_devices


def _hush() -> None:
    """Silence what the user can do nothing about. Errors still get through.

    TRL reports to its makers when a trainer is made; lorafit has no telemetry, so it is off here.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # retries while offline
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of our own are rich's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|trl|peft|accelerate|bitsandbytes|datasets|gguf)(\.|$)"
    )
    for name in ("bitsandbytes", "torch.distributed", "accelerate", "peft", "trl", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _see_one_gpu() -> None:
    """Leave the first visible GPU in sight. To be done before CUDA starts, which importing bitsandbytes does."""
    name = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
    visible = visible_devices(name)
    if visible != [] and processes() == 1:
        os.environ[name] = visible[0] if visible else "0"


_hush()
_see_one_gpu()


def hush_progress() -> None:
    """Turn off the progress bars of libraries that are already imported."""
    import datasets
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
