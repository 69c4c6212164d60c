"""transformers: models whose attention is ropecy's, by ``attn_implementation="ropecy"`` after `register`.

Queries and keys arrive rotated, by whatever scaling rule the model has, so this is attention on rotated rows.

What a query sees is what the model's mask says: transformers asks ropecy to make the mask, and ropecy keeps a
description of it (`ropecy.transformers.described_mask`) that carries causality, windows, padding and packed sequences
to the attention. What the module says of itself, ``is_causal`` or ``sliding_window``, counts only where the model makes
no mask at all; then it is what transformers' own attention by PyTorch makes of it. A model that computes attention in
code of its own, and does not call ropecy's, is given the mask that eager attention has.

Refused are, of the models of transformers 5.24.0 that ``tests/sweep_transformers.py`` builds, those that hand to their
attention one of these:

* a mask or a bias of n x n_k numbers (attention_mask): canary, cohere_asr, doge, glm5_next, glm5_next_text,
  parakeet_ctc, parakeet_encoder, parakeet_rnnt, parakeet_tdt, pixtral, sam3, sam3_lite_text, t5gemma2
* what is added to each score (position_bias): inkling_mm_model, inkling_text, longt5, mt5, switch_transformers, t5,
  umt5, wav2vec2-bert, wav2vec2-conformer
* a bound by which scores are bent (softcap): gemma2, t5gemma, vaultgemma
* weights that no key has (s_aux, sinks): deepseek_v4, flint, gpt_oss, granite_swa, granitemoe_swa, hy_v4, hy_v4_vl,
  hy_v4_vl_text, inkling2, inkling2_loop, inkling2_loop_text, inkling2_text, mimo_v2_flash, openai_privacy_filter
* a choice of keys for each query (indices): axk2, deepseek_v32, dots3_note_text, glm_moe_dsa, mistral_large4,
  mistral_large4_text

Continuous batching (``generate_batch``) refuses ropecy: it takes "paged|eager" and "sdpa", which are handed masks of
n x n_k numbers, and names with "flash" in them, for which transformers loads a kernel of that name. Caches in pages are
read by `ropecy.torch.varlen_attn`.

There is no cache made of `ropecy.DecodeState`. A model hands its attention what ``Cache.update`` returns, tensors of
all keys and values, and neither the cache nor a state, so one would have to be smuggled through them, while masks
are made for keys that are gone. A running sum can't be cropped either, nor can padding be taken out of it, which
assisted decoding and batches of prompts do; and keys of pretrained models are far past any `bound`.
"""

from .attention import register

__all__ = ["register"]
