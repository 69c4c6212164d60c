"""A token of a model of transformers, after a cache of many: attention by ropecy beside PyTorch's own."""

import statistics
from functools import partial

import ropecy

from .decode import _seconds

TOKENS = 4096


class Generate:
    """A random Llama of eight layers, 16 heads of width 64 and 4 key heads; the cache has random keys and values."""

    params = (("float32", "bfloat16"),)
    param_names = ("dtype",)
    timeout = 300

    def setup(self, dtype):
        try:
            import torch
            from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
        except ImportError:
            raise NotImplementedError("torch or transformers is not installed") from None
        from ropecy.transformers import register

        register()
        torch.set_num_threads(ropecy.info()["threads"])
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=4,
            vocab_size=8000,
            max_position_embeddings=2 * TOKENS,
        )
        kind = getattr(torch, dtype)
        model = LlamaForCausalLM(config).to(kind).eval()
        caches = {name: DynamicCache(config=config) for name in ("sdpa", "ropecy")}
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(2, 1, 4, TOKENS, 64).to(kind)
            for cache in caches.values():
                cache.update(keys, values, layer)
        token = torch.ones(1, 1, dtype=torch.long)

        def step(name):
            model.set_attn_implementation(name)
            with torch.no_grad():
                model(token, past_key_values=caches[name])

        self.step = step

    def track_sdpa_over_ropecy(self, dtype):
        """Seconds a token, the two taking turns."""
        turns = [[_seconds(partial(self.step, name)) for name in ("sdpa", "ropecy")] for _ in range(10)]
        theirs, ours = (statistics.median(times) for times in zip(*turns[1:], strict=True))
        return theirs / ours

    track_sdpa_over_ropecy.unit = "times"
