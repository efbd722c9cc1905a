"""Small random networks for the tests: transformers' as the oracle, ours with the same weights, ours alone."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dgemma.config import FULL, SLIDING, LayerConfig, ModelConfig, model_config_from_dict
from dgemma.nn import DiffusionTransformer
from dgemma.weights.names import network_name

S, F = SLIDING, FULL

# Every entry differs from the others in several ways; `text` keys are those of `DiffusionGemmaTextConfig`.
SHAPES: dict[str, dict[str, Any]] = {
    "alternating": dict(layer_types=[S, F, S, F], hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=16, global_head_dim=32, num_global_key_value_heads=1, sliding_window=12,
                        num_experts=8, top_k_experts=2, canvas_length=16),
    "five-to-one": dict(num_hidden_layers=6, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                        global_head_dim=16, num_global_key_value_heads=2, sliding_window=5, num_experts=16,
                        top_k_experts=4, canvas_length=8),
    "all-full": dict(layer_types=[F, F, F], hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                     global_head_dim=24, sliding_window=64, num_experts=4, top_k_experts=1, canvas_length=32),
    "multi-query": dict(layer_types=[S, S, F], hidden_size=64, num_attention_heads=8, num_key_value_heads=1,
                        head_dim=8, global_head_dim=8, num_global_key_value_heads=8, sliding_window=16, num_experts=32,
                        top_k_experts=8, canvas_length=20),
    "seventeen-experts": dict(layer_types=[S, F], hidden_size=40, num_attention_heads=5, num_key_value_heads=5,
                              head_dim=12, global_head_dim=20, num_global_key_value_heads=1, sliding_window=33,
                              num_experts=17, top_k_experts=3, canvas_length=16),
    "wide-window": dict(layer_types=[S, S, F, S, F], hidden_size=96, num_attention_heads=3, num_key_value_heads=1,
                        head_dim=32, global_head_dim=64, sliding_window=64, num_experts=6, top_k_experts=3,
                        canvas_length=24,
                        rope_parameters={S: {"rope_type": "default", "rope_theta": 1e4},
                                         F: {"rope_type": "proportional", "rope_theta": 1e5}}),
    "odd-sizes": dict(layer_types=[S, S, S, F], hidden_size=36, intermediate_size=50, moe_intermediate_size=20,
                      vocab_size=101, num_attention_heads=6, num_key_value_heads=2, head_dim=10, global_head_dim=14,
                      num_global_key_value_heads=3, sliding_window=7, num_experts=3, top_k_experts=3, canvas_length=13,
                      rms_norm_eps=1e-5, final_logit_softcapping=10.0,
                      rope_parameters={S: {"rope_type": "default", "rope_theta": 500.0},
                                       F: {"rope_type": "proportional", "rope_theta": 3e4,
                                           "partial_rotary_factor": 0.5}}),
    "deep": dict(layer_types=[S, S, F, S, S, F, S, F], hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
                 head_dim=8, global_head_dim=16, num_global_key_value_heads=2, sliding_window=20, num_experts=24,
                 top_k_experts=6, canvas_length=16),
    "last-layer-forced-full": dict(layer_types=[S, S, S], hidden_size=56, num_attention_heads=4,
                                   num_key_value_heads=2, head_dim=14, global_head_dim=28,
                                   num_global_key_value_heads=4, sliding_window=9, num_experts=64, top_k_experts=5,
                                   canvas_length=16),
}


def randomise(network: torch.nn.Module, seed: int, peak: float = 2.0, feedback: float = 1.0,
              change: float = 0.5) -> None:
    """Random numbers in every weight: norms, router scales and both layer scalars too.

    Matrices keep a vector's size, attention and routing choose without being chaotic, logits have deviation ``peak``.
    ``feedback`` is the strength of self-conditioning: at 1 a rounding error doubles with every denoising step.
    ``change`` is what a layer adds to the residual stream: the less, the more a canvas stays what it is.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        width = tensor.shape[-1] if tensor.ndim else 1
        if "embed_tokens" in name and tensor.ndim == 2:
            tensor.data.normal_(0.0, peak * width**-0.5, generator=generator)
        elif name.endswith("router.proj.weight"):
            tensor.data.normal_(0.0, 2.0, generator=generator)  # it reads vectors of length 1
        elif tensor.ndim > 1:
            tensor.data.normal_(0.0, width**-0.5, generator=generator)
            if name.endswith("self_conditioning.down_proj.weight"):
                tensor.data.mul_(feedback)
        elif "norm" in name or name.endswith(("router.scale", "per_expert_scale", "layer_scalar")):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
            if "q_norm" in name or "k_norm" in name:
                tensor.data.mul_((2.0 * width**-0.5) ** 0.5)
            elif "post_" in name:
                tensor.data.mul_(change)


def reference_model(shape: dict[str, Any], seed: int = 0, vision: dict[str, Any] | None = None,
                    **strengths: float) -> Any:
    """transformers' network in this shape, randomised; ``vision`` is the shape of its tower, by itself next to none."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        Gemma4VisionConfig,
    )

    text = dict(vocab_size=160, intermediate_size=72, moe_intermediate_size=24,
                use_bidirectional_attention="vision") | copy.deepcopy(shape)
    canvas_length = text.pop("canvas_length")
    text.setdefault("num_hidden_layers", len(text.get("layer_types", ())))
    tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                 num_key_value_heads=1, head_dim=8, position_embedding_size=4) | (vision or {})
    config = DiffusionGemmaConfig(text_config=DiffusionGemmaTextConfig(**text), canvas_length=canvas_length,
                                  vision_config=Gemma4VisionConfig(**tower))
    model = DiffusionGemmaForBlockDiffusion(config).eval().requires_grad_(False)
    randomise(model, seed, **strengths)
    return model


def config_dict(model: Any, spelling: str = "per_layer_config") -> dict[str, Any]:
    """The model's ``config.json``, full layers described as transformers writes them or by the global names."""
    data = model.config.to_dict()
    if spelling == "global_head_dim":
        text = data["text_config"]
        geometry = text.pop("per_layer_config")
        full = [geometry[str(i)] if str(i) in geometry else geometry[i]
                for i, kind in enumerate(text["layer_types"]) if kind == FULL]
        assert all(layer == full[0] for layer in full)
        text["global_head_dim"] = full[0].get("head_dim", text["head_dim"])  # left out where it is the same
        if "num_key_value_heads" in full[0]:
            text["num_global_key_value_heads"] = full[0]["num_key_value_heads"]
    return data


def network_like(model: Any, spelling: str = "per_layer_config", cache_type: str | None = None) -> DiffusionTransformer:
    """Our network with the weights of transformers' model."""
    network = DiffusionTransformer(model_config_from_dict(config_dict(model, spelling)), cache_type)
    tensors = {}
    for name, tensor in model.state_dict().items():
        ours = network_name(name)
        if ours is not None:
            tensors[ours] = tensor
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


class RoutingMargin:
    """While it is open, how narrowly any router of a network decided: the least gap of the last chosen expert's score.

    A gap within rounding error may fall either way, and then two right implementations differ a lot.
    """

    def __init__(self, network: torch.nn.Module, top_k: int):
        self.top_k, self.least = top_k, float("inf")
        self._routers = [module for name, module in network.named_modules() if name.endswith("router.proj")]

    def _watch(self, module: torch.nn.Module, inputs: Any, scores: torch.Tensor) -> None:
        if self.top_k < scores.shape[-1]:
            best = scores.topk(self.top_k + 1, dim=-1).values
            self.least = min(self.least, (best[:, -2] - best[:, -1]).min().item())

    def __enter__(self) -> RoutingMargin:
        self._hooks = [router.register_forward_hook(self._watch) for router in self._routers]
        return self

    def __exit__(self, *failure: Any) -> None:
        for hook in self._hooks:
            hook.remove()


def random_network(config: ModelConfig, seed: int = 0, cache_type: str | None = None,
                   kind: type[DiffusionTransformer] = DiffusionTransformer, **strengths: float) -> DiffusionTransformer:
    """Our network alone, randomised; of a ``kind`` that may do something else than ours."""
    network = kind(config, cache_type).eval().requires_grad_(False)
    randomise(network, seed, **strengths)
    return network


def the_26b() -> ModelConfig:
    """The shape of the 26B model."""
    sliding, full = LayerConfig(SLIDING, 256, 8, 1e4, 1.0), LayerConfig(FULL, 512, 2, 1e6, 0.25)
    return ModelConfig(262_144, 2816, 2112, 16, 128, 8, 704, 1024,
                       tuple(full if i % 6 == 5 else sliding for i in range(30)))


def tiny_config(**changes: Any) -> ModelConfig:
    """A ModelConfig of two sliding and one full layer, as small as a test can use."""
    text = dict(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, global_head_dim=12, num_global_key_value_heads=1,
                layer_types=[SLIDING, SLIDING, FULL], sliding_window=6, num_experts=4, top_k_experts=2,
                moe_intermediate_size=16, use_bidirectional_attention="vision")
    canvas_length = changes.pop("canvas_length", 8)
    return model_config_from_dict({"model_type": "diffusion_gemma", "canvas_length": canvas_length,
                                   "text_config": text | changes})
