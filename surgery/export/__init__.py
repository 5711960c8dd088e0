"""A patched model as files: a checkpoint with its surgery, weights with the cuts folded in, the surgery alone."""
