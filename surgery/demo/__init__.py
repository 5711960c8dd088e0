"""A small trained induction model, the data it was trained on, the script that trained it, and the study of its heads."""

from surgery.demo.subject import load_model as load_model
