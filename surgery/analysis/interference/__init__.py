"""Which heads does learning one task disturb for another, and in which of Q, K, V and O? See `surgery.analysis`."""
