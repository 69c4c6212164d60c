"""Every small model that transformers can build, by ropecy beside eager attention: a command, not a test of the suite.

    python tests/sweep_transformers.py [--part 1/4] [--out FILE] [names of model types]

Each configuration class of the installed transformers is made small (two layers, four heads, width 32), its models get
random weights of one seed, and run batches of one and two without padding, with padding on the left and on the right,
and two more tokens from a cache. A case agrees when the logits of kept tokens are within 1e-4 of eager attention's, in
units of the largest logit where that is above 1. It is refused when a NotImplementedError names what the model wants.
"as sdpa" are cases where eager attention and transformers' own attention by PyTorch are two things although both have
the same masks, and ropecy's is the latter: no mask is made for a module that says of itself that it is causal.
Anything else is wrong, and then the command's exit status is 1. Models that transformers does not build from a small
configuration, or that do not run with eager attention either, are counted and listed too. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import inspect
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers import masking_utils
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ropecy.transformers import register

SDPA = "every-mask-whole"
TOLERANCE = 1e-4
TOKENS, DECODER_TOKENS, PADDED = 24, 9, 5
LARGEST = 20_000_000  # parameters
SECONDS = 120  # for all cases of one class of models
MEMORY = 12 << 30

# What whole numbers of a configuration become, by the first pattern that matches the whole name: a key of VARIANTS, a
# number, or None where they stay. Token ids and vocabularies go by themselves.
SIZES = (
    (r".*token_(id|idx|index)", None),
    (r".*(key_value_heads|kv_heads|num_query_groups|num_groups_kv|multi_query_group_num)", "key heads"),
    (r".*(attention_heads|num_heads|n_heads?|_heads)", "heads"),
    (r"qk_head_dim", None),
    (r"(.*_)?head_dim|d_kv|head_size|kv_channels|d_head|attention_head_size|rotary_dim", "head"),
    (r"first_k_dense_replace|num_nextn_predict_layers|num_kv_shared_layers|num_mtp.*", 0),
    (r".*(conv|feat_extract|tdnn).*layers", None),
    (r"max_window_layers", 1),
    (r".*(hidden_layers|num_layers|n_layers?|_layers|num_blocks|depth)|layers", "layers"),
    (r".*vocab_size.*", 99),
    (r".*(lora_rank|_rank)", 8),
    (r".*(num_experts_per_tok|experts_per_token|moe_topk|top_k_experts)|moe_k|top_k", 2),
    (r".*(n_routed_experts|num_experts|num_local_experts)", 4),
    (r"n_group|topk_group|num_expert_group", 1),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|ffn_size|mlp_dim|shared_expert.*size).*", 64),
    (r"local_attention", 8),
    (r"attention_window", 8),
    (r".*(sliding_window|window_size_left)", 5),
    (r"attention_chunk_size", 6),
    (r"num_channels|in_channels|num_labels|.*type_vocab_size|.*_type_size", None),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|emb_dim|d_embed|projection_dim)|dim", "width"),
    (r".*(hidden_size|embedding_size|width).*", "width"),
    (r"(.*_)?image_size", 32),
    (r".*patch_size", 8),
    (r".*(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length|seq_length)", 128),
)
# Tried in turn, until the model builds and runs with eager attention.
VARIANTS = (
    {"width": 32, "heads": 4, "key heads": 2, "head": 8},
    {"width": 32, "heads": 4, "key heads": 4, "head": 8},
    {"width": 32, "heads": 4, "key heads": 2, "head": 64},
    {"width": 32, "heads": 4, "key heads": 2, "head": 128},
    {"width": 64, "heads": 4, "key heads": 4, "head": 16},
    {"width": 128, "heads": 2, "key heads": 2, "head": 64},
    {"width": 512, "heads": 4, "key heads": 2, "head": 128},
    {"width": 32, "heads": 4, "key heads": 4, "head": 8, "types": 0},
)
# What the configurations of some types of models need beside, most of them to build at all from their defaults.
NEEDED: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 99},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "ministral": {"head_dim": 8},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PER_LAYER = re.compile(r".*(layer_types|layers_block_type|layers_types)|auto_map")


def shrink(kind: type, variant: dict[str, int]) -> transformers.PreTrainedConfig:
    """A small configuration of the class `kind`, with sub-configurations as small and each type of layer once."""
    default = kind()
    types = list(dict.fromkeys(getattr(default, "layer_types", None) or ())) if variant.get("types", 1) else []
    types = types * 2 if len(types) == 1 else types
    variant = variant | {"layers": max(2, len(types))}
    changed: dict[str, object] = {"layer_types": types} if types else {}
    for name, value in vars(default).items():
        if name.startswith("_") or PER_LAYER.fullmatch(name):
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            changed[name] = shrink(type(value), variant)
        elif type(value) is int:
            changed[name] = size(name, value, variant)
        elif name == "use_sliding_window":
            changed[name] = True
        elif name in SPECIAL:
            changed[name] = SPECIAL[name]
    others = sorted(n for n, v in changed.items() if re.fullmatch(r".*token_(id|idx|index)", n) and n not in SPECIAL)
    changed.update({n: 98 - i for i, n in enumerate(others)})
    changed.update({n: v for n, v in SPECIAL.items() if n in changed})
    return kind(**changed | NEEDED.get(kind.model_type, {}))


def size(name: str, value: int, variant: dict[str, int]) -> int:
    small = next((small for pattern, small in SIZES if re.fullmatch(pattern, name)), None)
    if isinstance(small, str):
        return variant[small] if value else value
    return value if small is None else min(value, small)


def classes(config_class: type) -> list[type]:
    """The models of a configuration with heads that give logits, or the bare one."""
    found = []
    tables = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT")
    for table in tables:
        try:
            model = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING")[config_class]
        except KeyError:
            continue
        found += [model] if isinstance(model, type) else list(model)
    if not found:
        try:
            model = modeling_auto.MODEL_MAPPING[config_class]
            found += [model] if isinstance(model, type) else list(model)[:1]
        except KeyError:
            pass
    return list(dict.fromkeys(found))


def build(model_class: type, config_class: type) -> torch.nn.Module:
    """The model with weights that make attention far from uniform, in the first variant that runs, or that builds."""
    failures: list[Exception] = []
    built = None
    for variant in VARIANTS:
        try:
            model = _build(model_class, shrink(config_class, variant))
        except Exception as error:
            failures.append(error)
            continue
        built = built or model
        for given in inputs(model, 2, None):
            try:
                run(model, given, False)
                return model
            except Exception:
                continue
    if built is None:
        raise failures[0]
    return built


def _build(model_class: type, config: transformers.PreTrainedConfig) -> torch.nn.Module:
    if model_class.__name__.endswith(("LMHeadModel", "ForCausalLM", "Decoder")) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class._from_config(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise MemoryError(f"{count} parameters")
    torch.manual_seed(5)
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
    return model


def inputs(model: torch.nn.Module, batch: int, side: str | None) -> list[dict]:
    """What the model may be called with; the first that it takes counts."""
    generator = torch.Generator().manual_seed(1)
    config, name = model.config, model.main_input_name
    wants = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 61, (batch, TOKENS), generator=generator)
    mask = torch.ones(batch, TOKENS, dtype=torch.long)
    if side:
        mask[0, slice(None, PADDED) if side == "left" else slice(-PADDED, None)] = 0
    ids[:, -PADDED - 1] = SPECIAL["eos_token_id"]  # models that pool take this token
    text = {"input_ids": ids * mask} | ({"attention_mask": mask} if side else {})
    decoder = {"decoder_input_ids": ids[:, :DECODER_TOKENS]} if "decoder_input_ids" in wants else {}
    images = [{"pixel_values": torch.randn(shape, generator=generator)} for shape in _image_shapes(config, batch)]
    if "grid_thw" in wants and "input_ids" not in wants:
        entries = _find(config, "in_channels", "num_channels") or 3
        entries *= (_find(config, "temporal_patch_size") or 1) * (_find(config, "patch_size") or 8) ** 2
        grid = torch.tensor([[1, 4, 4], [1, 4, 8]][:batch])
        rows = int(grid.prod(1).sum())
        return [] if side else [{next(iter(wants)): torch.randn(rows, entries, generator=generator), "grid_thw": grid}]
    if name == "input_ids":
        boxes = {"bbox": torch.zeros(batch, TOKENS, 4, dtype=torch.long)} if "bbox" in wants else {}
        with_images = [text | image for image in images] if "pixel_values" in wants else []
        return [text | decoder | boxes, *with_images]
    if side:
        return []
    if name == "pixel_values":
        return [image | decoder for image in images] + [image | text for image in images]
    mels = _find(config, "num_mel_bins", "feature_size", "feature_projection_input_dim") or 80
    shapes = {
        "input_values": [(batch, 2000), (batch, 1, 2000), (batch, _find(config, "max_length") or 32, mels)],
        "input_features": [(batch, mels, 2 * (_find(config, "max_source_positions") or 32)), (batch, 64, mels)],
    }
    return [{name: torch.randn(shape, generator=generator)} | decoder for shape in shapes.get(name, [])]


def _image_shapes(config: transformers.PreTrainedConfig, batch: int) -> list[tuple[int, ...]]:
    side = _find(config, "image_size", "input_size") or 32
    height, width = side if isinstance(side, list | tuple) else (side, side)
    channels = _find(config, "num_channels", "in_channels", "in_chans") or 3
    frames = _find(config, "num_frames") or 2
    return [(batch, channels, height, width), (batch, frames, channels, height, width)]


def _find(config: transformers.PreTrainedConfig, *names: str):
    """The first of these attributes that the configuration or one within it has."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    parts = (x for x in vars(config).values() if isinstance(x, transformers.PreTrainedConfig))
    return next((x for part in parts if (x := _find(part, *names)) is not None), None)


def first_result(output):
    for name in ("logits", "last_hidden_state", "prediction_logits", "pooler_output"):
        if isinstance(x := getattr(output, name, None), torch.Tensor):
            return x
    return next(x for x in output.to_tuple() if isinstance(x, torch.Tensor) and x.is_floating_point())


@torch.no_grad()
def run(model: torch.nn.Module, given: dict, step: bool) -> torch.Tensor | None:
    """Logits, or those of two tokens more after the cache that the first call leaves; None where it leaves none."""
    torch.manual_seed(7)
    output = model(**given, **({"use_cache": True} if step else {}))
    if not step:
        return first_result(output)
    if (cache := getattr(output, "cache", None)) is None:
        return None
    ids = given["input_ids"]
    more = {"input_ids": torch.full_like(ids[:, :2], 7), "cache": cache}
    if "attention_mask" in given:
        more["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 2), value=1)
    return first_result(model(**more, use_cache=True))


def judge(eager: torch.nn.Module, ours: torch.nn.Module, given: dict, step: bool) -> str:
    """agrees, as sdpa, refused: ..., wrong: ..., or eager: ... where eager attention gives nothing to compare with."""
    try:
        theirs, again = (run(eager, given, step) for _ in range(2))
    except Exception as error:
        return f"eager: {brief(error)}"
    if theirs is None or not theirs.isfinite().all() or not torch.equal(theirs, again):
        return "eager: no cache" if theirs is None else "eager: logits that are not finite, or others at each call"
    try:
        result = run(ours, given, step)
    except NotImplementedError as error:
        return f"refused: {brief(error)}"
    except Exception as error:
        return f"wrong: {brief(error)}"
    if (error := difference(theirs, result, given, step)) <= TOLERANCE:
        return "agrees"
    try:
        ours.set_attn_implementation(SDPA)
        as_sdpa = difference(run(ours, given, step), result, given, step) <= TOLERANCE
    except Exception:
        as_sdpa = False
    ours.set_attn_implementation("ropecy-exact")
    return "as sdpa" if as_sdpa else f"wrong: off by {error:.2g} of the largest logit"


def whole_mask(**arguments) -> torch.Tensor:
    return masking_utils.sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def difference(theirs: torch.Tensor, result: torch.Tensor, given: dict, step: bool) -> float:
    """The largest difference at kept tokens, in units of the largest logit where that is above 1."""
    mask = given.get("attention_mask")
    if mask is not None and not step and theirs.shape[:2] == mask.shape:
        theirs, result = theirs[mask.bool()], result[mask.bool()]
    return (result - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def cases(model_class: type, config_class: type) -> dict[str, str]:
    """What each case of one class of models comes to."""
    try:
        eager = build(model_class, config_class)
    except Exception as error:
        return {"build": f"not built: {brief(error)}"}
    ours = copy.deepcopy(eager)
    try:
        ours.set_attn_implementation("ropecy-exact")
        ours.config._attn_implementation = "ropecy-exact"
    except Exception as error:
        return {"build": f"not built: {brief(error)}"}
    results = {}
    wants = inspect.signature(eager.forward).parameters
    for batch in (1, 2):
        for side in (None, "left", "right"):
            for step in (False, True):
                if step and ("use_cache" not in wants or "input_ids" not in wants or "decoder_input_ids" in wants):
                    continue
                verdicts = [judge(eager, ours, given, step) for given in inputs(eager, batch, side)]
                ran = [v for v in verdicts if not v.startswith("eager")] or verdicts[:1]
                for verdict in ran[:1]:
                    results[f"batch {batch}, {side or 'no'} padding{', cache' if step else ''}"] = verdict
    return results or {"inputs": f"eager: no input is known for {eager.main_input_name}"}


def in_process(model_class: type, config_class: type) -> dict[str, str]:
    """`cases` in a process of its own, which may die or hang."""
    ours, theirs = multiprocessing.Pipe(False)

    def work():
        faulthandler.enable()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        theirs.send(cases(model_class, config_class))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGALRM
        result = {"build": f"not built: {SECONDS} s passed"} if late else {"run": f"wrong: exit {process.exitcode}"}
    process.join()
    return result


def summary(results: dict[str, dict[str, str]]) -> collections.Counter[str]:
    """Counts of classes: wrong if one case is, refused if one is, agrees if one is, else what its cases come to."""
    counts: collections.Counter[str] = collections.Counter()
    for verdicts in results.values():
        kinds = {v.partition(":")[0] for v in verdicts.values()}
        counts[next(k for k in ("wrong", "refused", "as sdpa", "agrees", "eager", "not built") if k in kinds)] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="model types, by default all")
    parser.add_argument("--part", default="1/1", help="k/n: the k-th of n parts of the list")
    parser.add_argument("--out", help="a JSON file for all verdicts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    register("ropecy-exact", method="exact")
    transformers.AttentionInterface.register(SDPA, transformers.AttentionInterface()["sdpa"])
    transformers.AttentionMaskInterface.register(SDPA, whole_mask)
    k, n = map(int, options.part.split("/"))
    results: dict[str, dict[str, str]] = {}
    for name in (options.names or sorted(CONFIG_MAPPING))[k - 1 :: n]:
        try:
            models = classes(CONFIG_MAPPING[name])
        except Exception as error:
            results[name] = {"build": f"not built: {brief(error)}"}
            continue
        for model_class in models:
            label = f"{name} {model_class.__name__}"
            results[label] = in_process(model_class, CONFIG_MAPPING[name])
            bad = {v for v in results[label].values() if v != "agrees"}
            print(f"{label}: {'; '.join(sorted(bad)) or 'agrees'}", flush=True)
            if options.out:
                with open(options.out, "w") as file:
                    json.dump(results, file, indent=1)
    counts = summary(results)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {dict(counts)}")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
