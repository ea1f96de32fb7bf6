"""One page from any set of runs."""
