"""One trial: splits, training, records and a file; no engine."""
