"""Talking to a run's models, or to any model, in the terminal."""
