"""Evaluation: models side by side on the same rows, with intervals, gates and reports.

options (what was asked) -> sets (rows) and contenders (models) -> engine (likelihoods, answers), kept row by row in
records -> assemble (metrics, statistics, gates) -> results.json and the reports made of it. Light: no torch here.
"""
