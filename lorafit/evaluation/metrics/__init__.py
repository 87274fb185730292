"""Metrics of generated answers against expected ones, row by row."""
