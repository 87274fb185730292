"""Recipes of other tools -> lorafit's: a table of keys for each tool, and what no single key decides.

dialect (their YAML) -> kinds (whose it is) -> convert (by the tables) -> a Document, and what has no equivalent.
"""
