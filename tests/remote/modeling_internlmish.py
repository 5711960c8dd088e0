"""A decoder as people publish it beside a checkpoint: the rows of one projection lie by kv head, and kv heads are repeated."""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class InternLMishConfig(PretrainedConfig):
    model_type = "internlmish"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        attention_dropout=0.0,
        rope_base=10000.0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.attention_dropout = attention_dropout
        self.rope_base = rope_base
        super().__init__(**kwargs)


class InternLMishRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states):
        return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.eps)


def angles_of(position_ids, width, base):
    """Cosines and sines, (batch, position, width), each angle for both channels of a pair that lies half the width apart."""
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
    angles = torch.cat([position_ids[..., None] * base**-steps] * 2, dim=-1)
    return angles.cos(), angles.sin()


def swap_halves(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def with_positions(query, key, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + swap_halves(query) * sin, key * cos + swap_halves(key) * sin


def repeat_kv(states, times):
    batch, heads, length, width = states.shape
    if times == 1:
        return states
    return states[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


class InternLMishAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, width, bias=False)
        self.wo = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        **kwargs,
    ):
        batch, length, _ = hidden_states.size()
        groups = self.num_key_value_groups
        qkv_states = self.wqkv(hidden_states)
        qkv_states = qkv_states.view(batch, length, self.num_key_value_heads, groups + 2, self.head_dim)
        query_states = qkv_states[..., :groups, :]
        query_states = query_states.reshape(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        key_states = qkv_states[..., -2, :].transpose(1, 2)
        value_states = qkv_states[..., -1, :].transpose(1, 2)
        cos, sin = angles_of(position_ids, self.head_dim, self.config.rope_base)
        query_states, key_states = with_positions(query_states, key_states, cos.to(query_states), sin.to(query_states))
        if past_key_value is not None:
            key_states, value_states = past_key_value.update(key_states, value_states, self.layer_idx)
        key_states = repeat_kv(key_states, groups)
        value_states = repeat_kv(value_states, groups)
        attn_weights = torch.matmul(query_states, key_states.transpose(2, 3)) * self.head_dim**-0.5
        if attention_mask is not None:
            attn_weights = attn_weights + attention_mask
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query_states.dtype)
        attn_weights = nn.functional.dropout(attn_weights, p=self.config.attention_dropout, training=self.training)
        attn_output = torch.matmul(attn_weights, value_states)
        attn_output = attn_output.transpose(1, 2).contiguous().reshape(batch, length, -1)
        attn_output = self.wo(attn_output)
        return attn_output, attn_weights if output_attentions else None


class InternLMishMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.w2(nn.functional.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class InternLMishDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention_norm = InternLMishRMSNorm(config.hidden_size)
        self.attention = InternLMishAttention(config, layer_idx)
        self.ffn_norm = InternLMishRMSNorm(config.hidden_size)
        self.feed_forward = InternLMishMLP(config)

    def forward(self, hidden_states, **kwargs):
        attended, weights = self.attention(hidden_states=self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states)), weights


class InternLMishPreTrainedModel(PreTrainedModel):
    config_class = InternLMishConfig
    base_model_prefix = "model"
    _no_split_modules = ("InternLMishDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)


class InternLMishModel(InternLMishPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLMishDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = InternLMishRMSNorm(config.hidden_size)
        self.post_init()

    def _mask(self, attention_mask, states, past):
        """What the scores are added to: zero where a query may look, the lowest number where it may not."""
        length = states.shape[1]
        may = torch.ones(length, past + length, dtype=torch.bool, device=states.device).tril(past)[None, None]
        if attention_mask is not None:
            may = may & attention_mask[:, None, None, :].bool()
        mask = torch.zeros(may.shape, dtype=states.dtype, device=states.device)
        return mask.masked_fill(~may, torch.finfo(states.dtype).min)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, output_attentions=False):
        hidden_states = self.tok_embeddings(input_ids)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        mask = self._mask(attention_mask, hidden_states, past)
        all_weights = ()
        for layer in self.layers:
            hidden_states, weights = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_value=past_key_values,
                output_attentions=output_attentions,
            )
            all_weights = (*all_weights, weights)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            attentions=all_weights if output_attentions else None,
        )


class InternLMishForCausalLM(InternLMishPreTrainedModel, GenerationMixin):
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLMishModel(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        return self.output

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        cache=None,
        **kwargs,
    ):
        # The name under which generate of transformers 5.24 hands it on: it knows no other, and asks for none.
        past_key_values = cache if past_key_values is None else past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, bool(output_attentions))
        logits = self.output(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, attentions=outputs.attentions
        )
