"""Models run on rows in batches: log-likelihoods, divergences, options, greedy answers."""
