"""Attention that cannot be derived from transformers' interface: one short file for each distinct computation.

To add a family: see first whether its forward lacks only an argument (examples.py); else copy the shortest file (gptj.py),
name its class in `@register_patch`, import the file here, and add a row to tests/families.py. The README beside this file
says what goes into it.
"""

from patches import bloom as bloom
from patches import codegen as codegen
from patches import diffllama as diffllama
from patches import examples as examples
from patches import falcon as falcon
from patches import flint as flint
from patches import gpt2 as gpt2
from patches import gpt_neo as gpt_neo
from patches import gptj as gptj
from patches import longformer as longformer
from patches import mpt as mpt
from patches import pegasus_x as pegasus_x
from patches import prophetnet as prophetnet
from patches import sew_d as sew_d
from patches import streams as streams
from patches import torch_multihead as torch_multihead
