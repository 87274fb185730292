"""The heavy half: all that imports torch and what stands on it. Commands import it inside their functions."""
