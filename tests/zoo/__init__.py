"""A tiny random model of every model type of the installed transformers, built offline."""
