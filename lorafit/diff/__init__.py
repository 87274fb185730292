"""`lorafit diff`: what differs between two recipes, what follows, and what of that usually surprises. No torch."""
