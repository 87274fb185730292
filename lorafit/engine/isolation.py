"""Proof, on the model that is about to be trained, that packed rows do not see each other."""

from __future__ import annotations

from typing import Any

import torch

from lorafit.errors import ModelError
from lorafit.text import first_line

FIRST, SECOND = 7, 9
"""Tokens of the two rows of the proof."""


@torch.no_grad()
def check_isolation(trainer: Any) -> None:
    """Pack two rows as training does, and look at what the second becomes. Raises ModelError.

    It may neither change with the row before it (attention, a recurrent state or a convolution that
    reaches over the boundary), nor differ from what it becomes alone (positions that don't restart).
    What is allowed is rounding, relative to the spread of the logits.
    """
    model, collate = trainer.model, trainer.data_collator
    config = model.config.get_text_config()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2 * FIRST + SECOND,), generator=draw).tolist()
    first, other, second = ids[:FIRST], ids[FIRST : 2 * FIRST], ids[2 * FIRST :]

    def logits(*rows: list[int]) -> torch.Tensor:
        joined = [token for row in rows for token in row]
        batch = collate([{"input_ids": joined, "labels": joined, "seq_lengths": [len(row) for row in rows]}])
        batch.pop("labels")
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }
        with trainer.compute_loss_context_manager():
            found: torch.Tensor = model(**inputs, use_cache=False).logits[0, -SECOND:].float()
        return found

    here = f"this {config.model_type} model with attn_implementation {config._attn_implementation}"
    training = model.training
    model.eval()
    try:
        packed, elsewhere, alone = logits(first, second), logits(other, second), logits(second)
    except (ValueError, TypeError, NotImplementedError) as error:  # transformers refuses some models itself
        raise ModelError(f"rows can't be packed for {here}: {first_line(error)}; set training.packing: false") from None
    finally:
        model.train(training)
    spread = packed.std().item() or 1.0
    seen = (packed - elsewhere).abs().max().item() / spread
    moved = (packed - alone).abs().max().item() / spread
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    # LLM.int8() picks its outliers over all rows at once, so there one row does round another.
    mixes = getattr(model, "is_loaded_in_8bit", False)
    if seen > (0.05 if mixes else 1e-4 if exact else 2e-3) or moved > (1e-3 if exact else 0.25):
        what = "see each other" if seen > moved / 10 else "do not begin at position 0"
        raise ModelError(
            f"packed rows {what} in {here}: packing changes a row's logits by {max(seen, moved):.2g} of their spread; "
            "set training.packing: false"
        )
