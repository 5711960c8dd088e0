"""Measurements behind the numbers in README and here: scripts write JSON to results/, `table` turns it into tables."""
