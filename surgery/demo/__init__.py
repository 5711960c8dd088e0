"""A small trained induction model, the data it was trained on, and the script that trained it."""
