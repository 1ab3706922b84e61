# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Makes `transformers/`: tiny random checkpoints and their logits by the transformers library.

An independent implementation of every backbone that we load, in float32:

* `llama_*`: Llama, as transformers saves it, with GQA groups 1, 4 and 16, tied and untied; YaRN,
  linear and Llama 3's own rotary positions.
* `nosa`: the same Llama logits for a checkpoint with token importance whose `A` is 0.
* `minicpm`: Granite, which has the same three multipliers as MiniCPM under other names.
* `longrope_*`: Phi-3 with LongRoPE on both sides of the original length, its fused projections
  split; with and without an attention factor.

Run by hand with torch 2.13 and transformers 5.23; the tests read only what it wrote:

    python tests/golden/make_transformers.py
"""

import json
import math
import pathlib
import shutil

import numpy as np
import torch  # pyrefly: ignore[missing-import]  # only this generator needs it
from safetensors.torch import load_file, save_file
from transformers import (  # pyrefly: ignore[missing-import]  # as above
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

OUT = pathlib.Path(__file__).parent / "transformers"
VOCAB, WIDTH, MLP, LAYERS = 96, 64, 80, 2
LENGTHS = (1, 17, 64, 150)
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "attn_implementation": "eager",
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 64,
    "topk": 4,
    "use_nope": False,
    "dense_len": 8192,
}


def randomise(model):
    """Give the norms scales other than 1, so that a forgotten scale is seen."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.7, 1.3)


def write_logits(folder, model, lengths=LENGTHS):
    """Store logits at up to 12 positions of one sequence for each length."""
    arrays = {}
    for length in lengths:
        tokens = torch.randint(0, VOCAB, (1, length))
        at = np.unique(np.linspace(0, length - 1, 12).astype(int))
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0].float().numpy()
        arrays[f"{length}.tokens"] = tokens[0].numpy().astype(np.int16)
        arrays[f"{length}.positions"] = at.astype(np.int16)
        arrays[f"{length}.logits"] = logits[at]
    np.savez_compressed(folder / "logits.npz", **arrays)


def write_checkpoint(folder, config, state):
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def make_llama(name, **settings):
    """Save a Llama as transformers itself does."""
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **settings)).float().eval()
    randomise(model)
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink()
    write_logits(OUT / name, model)
    return model


def make_nosa(source):
    """Add an `A` of 0 and a random `delta` to a Llama: in attention they must do nothing."""
    config = json.loads((OUT / source / "config.json").read_text())
    state = load_file(OUT / source / "model.safetensors")
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn"
        state[f"{prefix}.A"] = torch.zeros(heads)
        state[f"{prefix}.delta.weight"] = torch.randn(heads, heads * dim)
    config["architectures"] = ["SparseLlamaForCausalLM"]
    config["sparse_config"] = SPARSE | {"select_blocks": 2}
    write_checkpoint(OUT / "nosa", config, state)
    shutil.copyfile(OUT / source / "logits.npz", OUT / "nosa" / "logits.npz")


def minicpm_config(heads, kv_heads, max_positions, rope_scaling, **scales):
    """Spell a configuration as MiniCPM4.1's config.json does."""
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        **{name: COMMON[name] for name in kept},
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": [2, 5],
        "torch_dtype": "float32",
        "sparse_config": SPARSE,
        **scales,
    }


def make_minicpm():
    """Write a Granite as a MiniCPM."""
    depth, base = 1.4, 16
    granite = GraniteConfig(
        **COMMON,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        embedding_multiplier=12.0,
        residual_multiplier=depth / math.sqrt(LAYERS),
        logits_scaling=WIDTH / base,
        attention_multiplier=(WIDTH // 8) ** -0.5,
    )
    model = GraniteForCausalLM(granite).float().eval()
    randomise(model)
    config = minicpm_config(8, 2, 512, None, scale_emb=12, scale_depth=depth, dim_model_base=base)
    write_checkpoint(OUT / "minicpm", config, model.state_dict())
    write_logits(OUT / "minicpm", model)


def make_longrope(name, max_positions, original):
    """Write a Phi-3 as a MiniCPM without multipliers."""
    heads, kv_heads, dim = 8, 2, WIDTH // 8
    scaling = {
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 1.7, 2.9, 4.8],
        "original_max_position_embeddings": original,
    }
    phi = Phi3Config(
        **COMMON,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=original,
        rms_norm_eps=1e-6,
        sliding_window=None,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "longrope", **scaling},
    )
    model = Phi3ForCausalLM(phi).float().eval()
    randomise(model)
    state = {}
    for key, tensor in model.state_dict().items():
        if "qkv_proj" in key:
            parts = tensor.split([heads * dim, kv_heads * dim, kv_heads * dim])
            for new, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                state[key.replace("qkv_proj", new)] = part
        elif "gate_up_proj" in key:
            for new, part in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                state[key.replace("gate_up_proj", new)] = part
        else:
            state[key] = tensor
    config = minicpm_config(
        heads,
        kv_heads,
        max_positions,
        {"rope_type": "longrope", **scaling},
        scale_emb=1,
        scale_depth=math.sqrt(LAYERS),
        dim_model_base=WIDTH,
    )
    write_checkpoint(OUT / name, config, state)
    write_logits(OUT / name, model, lengths=(20, original, original + 1, 150))


def main():
    """Make every case anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(0)
    plain = {"rope_theta": 10000.0, "rope_type": "default"}
    yarn = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}
    far = {"rope_theta": 500000.0, "rope_type": "default"}
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    grouped = dict(zip(heads, (8, 2, 8), strict=True))
    make_llama("llama_group_1", **dict(zip(heads, (4, 4, 16), strict=True)), rope_parameters=plain)
    make_llama("llama_group_4", **grouped, rope_parameters=far, tie_word_embeddings=True)
    make_llama("llama_group_16", **dict(zip(heads, (16, 1, 8), strict=True)), rope_parameters=plain)
    make_llama(
        "llama_yarn",
        **grouped,
        rope_parameters=yarn | {"original_max_position_embeddings": 64},
        max_position_embeddings=256,
    )
    make_nosa("llama_group_4")
    make_minicpm()
    make_longrope("longrope_plain", 64, 64)
    make_longrope("longrope_stretched", 1024, 64)
    stretched = dict(zip(heads, (4, 1, 16), strict=True)) | {"max_position_embeddings": 512}
    ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, **ramp}
    make_llama(
        "llama_3",
        **stretched,
        rope_parameters=llama3 | {"original_max_position_embeddings": 64},
    )
    linear = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    make_llama("llama_linear", **stretched, rope_parameters=linear)


if __name__ == "__main__":
    main()
