"""Speed and memory of a run's models: merged against unmerged, and quantized."""
