"""n trials on an engine, and what they leave."""
