"""A training step's memory, recorded on the real modules without data, weights or a GPU."""
