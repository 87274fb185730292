"""`lorafit explain`: every value of a recipe, where it was written, and what it was written over. No torch."""
