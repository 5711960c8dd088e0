"""Measurements behind the numbers in README: each script writes JSON to results/, `table` turns it into README's tables."""
