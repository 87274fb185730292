"""Merging an adapter into its base. What is asked is light; `lorafit.merge.make` does it."""

from lorafit.merge.options import Addition, Options

__all__ = ["Addition", "Options"]
