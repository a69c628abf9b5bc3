"""Solvers of ``H v = b``, given only the product ``v -> H v``: one file per method."""
