"""Data sources -> audited, tokenized rows with labels, in the shape that TRL's trainer takes."""
