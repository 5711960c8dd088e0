"""What the installed transformers calls the KV cache, as an argument of a model and in its output."""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""`model(ids, **{CACHE: cache})[CACHE]`: cache since transformers 5.24, past_key_values before."""
