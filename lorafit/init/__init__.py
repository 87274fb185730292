"""`lorafit init`: a first recipe from a model, its data and a GPU, or from another tool's recipe. No torch.

A new recipe: sample (the data) -> fit (settings for the memory) -> make. Another tool's: peers, by a table of keys.
Both are written, with comments, by `write`.
"""

from lorafit.init.propose import Document, Line

__all__ = ["Document", "Line"]
