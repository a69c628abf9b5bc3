"""Ray Tune: an ordinary class Trainable, and a searcher that tells Optuna how its trials really ended."""
