"""This library beside transformers, plain hooks and other libraries: the same work on the same weights and inputs.

`python -m benchmarks` (or `surgery bench`) runs it. A *way* (`way.py`) can load the model, cut heads, read and generate; a
*work* (`works.py`) is made of these. Each other library is measured in a process and an environment of its own, beside the
unpatched model and this library, which run there too (`worker.py`).
"""
