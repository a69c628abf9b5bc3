"""What is wrong with a problem, before a search."""
