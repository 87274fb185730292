"""A recipe's whole pipeline for a few steps, with a tiny random model of the same architecture."""
