"""`lorafit validate`: many recipes checked at once, every fault at the place where it was written. No torch."""
