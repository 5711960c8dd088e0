"""One thread for each test process: the models are tiny, and several processes share the cores."""

import torch

torch.set_num_threads(1)
