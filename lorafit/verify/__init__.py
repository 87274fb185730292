"""`lorafit verify`: whether a run is what its manifest says, and trains again as it did."""
