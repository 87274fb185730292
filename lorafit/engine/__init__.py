"""The heavy half: all that imports torch and what stands on it. Commands import it inside their functions.

Importing it keeps the libraries' own bars, notes and telemetry off the screen.
"""

from __future__ import annotations

import logging
import os
import warnings


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


_hush()


def hush_progress() -> None:
    """Turn off the progress bars of libraries that are already imported."""
    import datasets
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
