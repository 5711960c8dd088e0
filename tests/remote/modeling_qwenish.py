"""A decoder as people publish it beside a checkpoint: one fused projection, rotary positions, attention in its own method."""

import math

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class QwenishConfig(PretrainedConfig):
    model_type = "qwenish"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_channels=8,
        intermediate_size=40,
        attn_dropout_prob=0.0,
        rotary_base=10000.0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.kv_channels = kv_channels
        self.intermediate_size = intermediate_size
        self.attn_dropout_prob = attn_dropout_prob
        self.rotary_base = rotary_base
        super().__init__(**kwargs)


def turn(x, angles):
    """Rotates each channel of the first half with its partner in the second. x: (batch, position, head, d)."""
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.type_as(x)


class QwenishAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.kv_channels
        self.split_size = self.num_heads * self.head_dim
        self.rotary_base = config.rotary_base
        self.c_attn = nn.Linear(config.hidden_size, 3 * self.split_size)
        self.c_proj = nn.Linear(self.split_size, config.hidden_size, bias=False)
        self.attn_dropout = nn.Dropout(config.attn_dropout_prob)

    def _angles(self, position_ids):
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=position_ids.device) / self.head_dim
        return position_ids[..., None].float() * self.rotary_base**-steps

    def _attn(self, query, key, value, attention_mask=None):
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = scores / math.sqrt(self.head_dim)
        n_query, n_key = scores.shape[-2:]
        lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            scores = scores + attention_mask
        else:
            causal = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).tril(n_key - n_query)
            if attention_mask is not None:
                causal = causal & attention_mask
            scores = torch.where(causal, scores, lowest)
        weights = nn.functional.softmax(scores.float(), dim=-1)
        weights = weights.type_as(value)
        weights = self.attn_dropout(weights)
        output = torch.matmul(weights, value)
        return output.transpose(1, 2), weights

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, output_attentions=False):
        mixed = self.c_attn(hidden_states)
        query, key, value = mixed.split(self.split_size, dim=2)
        by_head = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        angles = self._angles(position_ids)
        query = turn(query.view(by_head), angles).permute(0, 2, 1, 3)
        key = turn(key.view(by_head), angles).permute(0, 2, 1, 3)
        value = value.view(by_head).permute(0, 2, 1, 3)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output, weights = self._attn(query, key, value, attention_mask)
        output = self.c_proj(output.reshape(*hidden_states.shape[:2], self.split_size))
        return (output, weights) if output_attentions else (output,)


class QwenishMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.c_proj(self.w1(hidden_states) * nn.functional.silu(self.w2(hidden_states)))


class QwenishBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size)
        self.attn = QwenishAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size)
        self.mlp = QwenishMLP(config)

    def forward(self, hidden_states, **kwargs):
        outputs = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + outputs[0]
        return (hidden_states + self.mlp(self.ln_2(hidden_states)), *outputs[1:])


class QwenishPreTrainedModel(PreTrainedModel):
    config_class = QwenishConfig
    base_model_prefix = "transformer"
    _no_split_modules = ("QwenishBlock",)
    _skip_keys_device_placement = ("past_key_values",)


class QwenishModel(QwenishPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([QwenishBlock(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, output_attentions=False):
        hidden_states = self.wte(input_ids)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :].bool()
        weights = []
        for block in self.h:
            outputs = block(
                hidden_states,
                layer_past=past_key_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                output_attentions=output_attentions,
            )
            hidden_states = outputs[0]
            weights.extend(outputs[1:])
        return self.ln_f(hidden_states), weights


class QwenishLMHeadModel(QwenishPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QwenishModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        use_cache=False,
        output_attentions=False,
        cache=None,
        **kwargs,
    ):
        # The name under which generate of transformers 5.24 hands it on: it knows no other, and asks for none.
        past_key_values = cache if past_key_values is None else past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_states, weights = self.transformer(
            input_ids, past_key_values, attention_mask, position_ids, output_attentions=output_attentions
        )
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values, attentions=tuple(weights) if output_attentions else None
        )
