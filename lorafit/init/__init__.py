"""`lorafit init`: a first recipe from a model, its data and a GPU, or from another tool's recipe. No torch.

A new recipe: settings that fit, each with its reason (`propose`). Another tool's: a table of keys for each (`peers`).
"""

from lorafit.init.document import Document, Line

__all__ = ["Document", "Line"]
