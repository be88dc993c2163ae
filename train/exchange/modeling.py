"""A softmax-only transformer (arXiv 2501.03489) for the transformers library.

This file lies beside the weights and needs nothing but torch and transformers:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Shapes: B sequences, S new tokens, K tokens with those in the cache, N heads, H head width, D model width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": nn.GELU("tanh"), "relu": F.relu, "identity": nn.Identity()}


class SoftmaxOnlyConfig(PretrainedConfig):
    """Sizes and ingredients of a model.

    Args:
        max_position_embeddings: context length T; later positions are refused.
        norm: "layernorm" or "none", before attention and before the FFN.
        activation: "gelu", "gelu_tanh", "relu" or "identity", between the two matrices of an FFN.
        biases: "query_key" or "all": which linear layers have one; a value's is part of the output's.
        softmax_temperature: "none", "per_head" or "per_position": what the logits of a softmax are divided by.
        positions: "learned" or "rotary".
        final_norm: whether a LayerNorm precedes the head.
        ffn: what follows the attention of each layer (class FeedForward); one word is for all layers.
    """

    model_type = "softmax_only"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache", "entropies"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=128,
        norm="none",
        activation="identity",
        biases="query_key",
        softmax_temperature="none",
        positions="learned",
        final_norm=True,
        ffn="matrix",
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.norm = norm
        self.activation = activation
        self.biases = biases
        self.softmax_temperature = softmax_temperature
        self.positions = positions
        self.final_norm = final_norm
        self.ffn = [ffn] * num_hidden_layers if isinstance(ffn, str) else list(ffn)
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


@dataclass
class SoftmaxOnlyOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast, and with `output_attentions` or `output_entropies` also the entropy of each softmax row.

    Attributes:
        entropies: in nats, one tensor [B, N, S] a layer.
    """

    entropies: tuple[torch.Tensor, ...] | None = None


class Embedding(nn.Module):
    """Word embedding, plus position embedding if positions are learned."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        is_learned = config.positions == "learned"
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size) if is_learned else None

    def forward(self, words_BSD, position_BS):
        return words_BSD if self.position is None else words_BSD + self.position(position_BS)


class Attention(nn.Module):
    """Softmax attention, softmax_j(q_i . k_j / (t_i sqrt(H))). Query and key have a bias, the output may have one."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        width = config.hidden_size
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=config.biases == "all")
        self.is_rotary = config.positions == "rotary"
        rows = {"none": 0, "per_head": 1, "per_position": config.max_position_embeddings}[config.softmax_temperature]
        self.temperature = nn.Parameter(torch.ones(rows, self.heads)) if rows else None

    def forward(self, x_BSD, position_BS, allowed_BSK, cache, with_weights):
        """Return the output [B, S, D], the weights [B, N, S, K] and the entropies [B, N, S]; None without weights."""
        q, k, v = (
            project(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if self.is_rotary:
            q, k = rotate(q, position_BS), rotate(k, position_BS)
        if self.temperature is not None:  # one multiplication for each element of the queries
            rows = position_BS if len(self.temperature) > 1 else torch.zeros_like(position_BS)
            t_BNS = exact(self.temperature)[rows].transpose(1, 2)
            q = (q / t_BNS.unsqueeze(-1)).to(q.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        weights, entropy = None, None
        if with_weights:
            scores = exact(q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            log_weights = scores.masked_fill(~allowed_BSK.unsqueeze(1), -math.inf).log_softmax(-1)
            weights = log_weights.exp()
            entropy = -(weights * log_weights.clamp(min=torch.finfo(log_weights.dtype).min)).sum(-1)
            weights = weights.to(v.dtype)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_BSK.unsqueeze(1))
        return self.output(out.transpose(1, 2).flatten(2)), weights, entropy


def exact(x):
    """Return x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x_BNSH, position_BS, base=10_000.0):
    """Rotate feature pairs (h, h + H/2) at position t by the angle t * base^(-2h/H)."""
    half = x_BNSH.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x_BNSH.device, dtype=exact(x_BNSH).dtype) / half)
    angles = (position_BS.unsqueeze(-1) * frequencies).unsqueeze(1)
    low, high = exact(x_BNSH).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_BNSH.dtype)


class FeedForward(nn.Module):
    """What follows attention.

    | kind           | computes                               |                                                     |
    |----------------|----------------------------------------|-----------------------------------------------------|
    | "none"         | x                                      | the next layers' weights contain it                 |
    | "matrix"       | matrix x                               | a linear FFN and its residual                       |
    | "fused"        | beta x + fused(norm(x))                | one matrix after a norm                             |
    | "two matrices" | beta x + down(activation(up(norm(x)))) |                                                     |
    """

    def __init__(self, config, kind):
        super().__init__()
        width, self.kind, has_bias = config.hidden_size, kind, config.biases == "all"
        self.activation = ACTIVATIONS[config.activation]
        if kind == "matrix":
            self.matrix = nn.Linear(width, width, bias=has_bias)
        elif kind == "fused":
            self.fused = nn.Linear(width, width, bias=has_bias)
        elif kind == "two matrices":
            self.up = nn.Linear(width, config.intermediate_size, bias=has_bias)
            self.down = nn.Linear(config.intermediate_size, width, bias=has_bias)
        if kind in ("fused", "two matrices"):
            self.beta = nn.Parameter(torch.ones(1))
            self.norm = nn.LayerNorm(width) if config.norm == "layernorm" else nn.Identity()

    def forward(self, x_BSD):
        if self.kind == "none":
            return x_BSD
        if self.kind == "matrix":
            return self.matrix(x_BSD)
        normed = self.norm(x_BSD)
        added = self.fused(normed) if self.kind == "fused" else self.down(self.activation(self.up(normed)))
        return self.beta * x_BSD + added


class Layer(nn.Module):
    """Attention with its residual, then what follows it."""

    def __init__(self, config, layer):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size) if config.norm == "layernorm" else nn.Identity()
        self.attention = Attention(config, layer)
        self.ffn = FeedForward(config, config.ffn[layer])

    def forward(self, x_BSD, *arguments):
        attended, weights, entropy = self.attention(self.attention_norm(x_BSD), *arguments)
        return self.ffn(x_BSD + attended), weights, entropy


class Transformer(nn.Module):
    """Embedding, layers and the norm before the head."""

    def __init__(self, config):
        super().__init__()
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size) if config.final_norm else nn.Identity()


class SoftmaxOnlyForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its head. Batches may be padded on either side, with an `attention_mask`."""

    config_class = SoftmaxOnlyConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar = ["Layer"]
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.embedding.word.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embedding.word

    def set_input_embeddings(self, value):
        self.transformer.embedding.word = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        output_entropies=None,
        logits_to_keep=0,
        return_dict=True,
        **ignored,
    ):
        """Return logits [B, S, V].

        Args:
            input_ids: [B, S].
            attention_mask: [B, K], 0 where there is padding; by default there is none.
            position_ids: [B, S]; by default the number of tokens before each one, without padding.
            cache, past_key_values: keys and values of earlier tokens; two names of one argument.
            labels: [B, S], those of `input_ids` themselves: they are shifted here. -100 does not count.
            output_attentions: also return the attention weights and entropies.
            output_entropies: also return the entropies.
            logits_to_keep: return logits of the last so many tokens only; 0 for all.

        Raises:
            ValueError: a token lies beyond the context length.
        """
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache()
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        words_BSD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        past, new = (0 if cache is None else cache.get_seq_length()), words_BSD.shape[1]
        position_BS = self._positions(attention_mask, position_ids, past, new, words_BSD)
        allowed_BSK = self._allowed(attention_mask, past, new, words_BSD)
        x_BSD = self.transformer.embedding(words_BSD, position_BS)
        hidden, attentions, entropies = [x_BSD], [], []
        for layer in self.transformer.layers:
            x_BSD, weights, entropy = layer(
                x_BSD, position_BS, allowed_BSK, cache, bool(output_attentions or output_entropies)
            )
            hidden.append(x_BSD)
            attentions.append(weights)
            entropies.append(entropy)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.transformer.final_norm(x_BSD)[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        output = SoftmaxOnlyOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            entropies=tuple(entropies) if output_attentions or output_entropies else None,
            **{CACHE: cache if use_cache else None},
        )
        return output if return_dict else output.to_tuple()

    def _positions(self, attention_mask, position_ids, past, new, like):
        """Return the position of each new token, [B, S]."""
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + new, device=like.device).unsqueeze(0)
        most = self.config.max_position_embeddings
        if past + new > most and (last := int(position_ids.max())) >= most:
            raise ValueError(
                f"a sequence has {last + 1} tokens, and this model was trained on {most}: give a shorter prompt, or "
                "ask for fewer new tokens"
            )
        return position_ids.clamp(max=most - 1).expand(like.shape[0], -1)

    def _allowed(self, attention_mask, past, new, like):
        """Return which of K tokens each new one may attend to, [B, S, K]. Padding attends to itself."""
        own, there = torch.arange(past, past + new, device=like.device), torch.arange(past + new, device=like.device)
        causal = (there <= own.unsqueeze(1)).unsqueeze(0)
        if attention_mask is None:
            return causal.expand(like.shape[0], -1, -1)
        if attention_mask.shape != (like.shape[0], past + new):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(like.shape[0], past + new)}: one "
                "number for each token, with those in the cache"
            )
        return causal & attention_mask.bool().unsqueeze(1) | (there == own.unsqueeze(1))
