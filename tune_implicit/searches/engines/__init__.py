"""Adapters to the search engines: one room per engine, none imports another."""
