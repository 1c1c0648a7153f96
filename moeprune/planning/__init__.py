"""From sums to a decision: which experts stay. Pure functions on numpy arrays."""
