"""Small random models of transformers, each eager and by ropecy, and what they are given."""

import copy

import torch

from ropecy.transformers import register

register("ropecy-exact", method="exact")

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2}


def make(model, config):
    """The same random model twice, eager and by ropecy."""
    torch.manual_seed(5)
    eager = model._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in eager.parameters():
            if p.dim() > 1:
                p.mul_(8)  # the initial weights are so small that attention is nearly uniform
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("ropecy-exact")
    return eager.eval(), ours.eval()


def tokens(b, n):
    return torch.randint(3, 61, (b, n), generator=torch.Generator().manual_seed(1))


def padded(side, b=3, n=21):
    counts = torch.tensor([n, n - 6, 4])[:b, None]
    places = torch.arange(n)
    return (places >= n - counts if side == "left" else places < counts).long()
