"""Fisher interference: which heads, and which of their blocks Q, K, V, O, learning one task disturbs for another."""
