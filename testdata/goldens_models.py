"""Tiny random models of every family in Hugging Face layout, with logits and gradients from transformers.

Each lies in crates/model/tests/data/<name>/ with its configuration in both forms: config.json in the form named in
`CONFIG_FORM`, config.alt.json in the other."""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from goldens_common import generator, save_json, save_tensors

VOCAB = 64
SEQUENCES, TOKENS = 2, 33
BASE = dict(vocab_size=VOCAB, hidden_act="silu", max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# With 8 values per head the wavelengths are 6, 20, 63 and 199 tokens: one kept, one interpolated, two divided.
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama2": LlamaConfig(**BASE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=4, rms_norm_eps=1e-5, rope_parameters=DEFAULT_ROPE),
    "llama3": LlamaConfig(**BASE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE),
    "smollm2": LlamaConfig(**BASE, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
                           num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
                           rope_parameters={"rope_type": "default", "rope_theta": 100000.0}),
    "mistral": MistralConfig(**BASE, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                             num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5, sliding_window=None,
                             rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen2": Qwen2Config(**BASE, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=True, use_sliding_window=False,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3": Qwen3Config(**BASE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-6, use_sliding_window=False,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
}
CONFIG_FORM = {"llama2": "old", "llama3": "old", "smollm2": "new", "mistral": "old", "qwen2": "new", "qwen3": "new"}
STORED_AS = {"smollm2": torch.bfloat16, "mistral": torch.float16, "qwen2": torch.bfloat16, "qwen3": torch.bfloat16}
SHARD_SIZE = {"llama2": "24KB"}
FULL_GRADIENTS = ("llama3", "qwen3")
SAMPLES = 3  # gradient entries kept of every parameter of the other families


def randomise(model: torch.nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Draws every parameter so that attention is far from uniform and no bias or norm is trivial; values are exact in
    `dtype`."""
    gen = generator(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=gen)
        if "q_norm" in name or "k_norm" in name:
            value = 2.0 + 0.3 * noise
        elif "norm" in name:
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = (0.2 if model.config.tie_word_embeddings else 0.7) * noise
        else:
            gain = 1.6 if ("q_proj" in name or "k_proj" in name) else 1.0
            value = gain * noise / parameter.shape[1] ** 0.5
        with torch.no_grad():
            parameter.copy_(value.to(dtype))


def old_form(config: dict) -> dict:
    """The configuration as transformers 4 wrote it: rope_theta and rope_scaling instead of rope_parameters."""
    config = copy.deepcopy(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    return config


def new_form(config: dict) -> dict:
    assert "rope_parameters" in config and "rope_theta" not in config
    return config


def make_model(name: str, folder: Path) -> torch.nn.Module:
    """Writes one model into `folder` and returns it as transformers reads it back, f32, eager attention."""
    index = list(MODELS).index(name)
    config = MODELS[name]
    stored_as = STORED_AS.get(name, torch.float32)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    randomise(model, 100 + index, stored_as)
    if folder.exists():
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory() as tmp:
        model.to(stored_as).save_pretrained(tmp, max_shard_size=SHARD_SIZE.get(name, "5GB"))
        written = json.loads((Path(tmp) / "config.json").read_text())
        forms = {"old": old_form(written), "new": new_form(written)}
        form = CONFIG_FORM[name]
        folder.mkdir(parents=True)
        for file in sorted(Path(tmp).glob("model*")):
            shutil.copyfile(file, folder / file.name)
        save_json(folder / "config.json", forms[form])
        save_json(folder / "config.alt.json", forms["new" if form == "old" else "old"])
    return load(folder)


def load(folder: Path, config_file: str = "config.json") -> torch.nn.Module:
    """Reads a model folder in f32, with one of its two configurations."""
    with tempfile.TemporaryDirectory() as tmp:
        for file in folder.glob("model*"):
            shutil.copyfile(file, Path(tmp) / file.name)
        shutil.copyfile(folder / config_file, Path(tmp) / "config.json")
        return AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.float32, attn_implementation="eager").eval()


def make(root: Path) -> None:
    data = root / "crates/model/tests/data"
    for index, name in enumerate(MODELS):
        folder = data / name
        model = make_model(name, folder)
        tokens = torch.randint(0, VOCAB, (SEQUENCES, TOKENS), generator=generator(200 + index))
        logits = model(tokens).logits
        with torch.no_grad():
            other = load(folder, "config.alt.json")(tokens).logits
        assert torch.equal(logits, other), f"{name}: the two config forms give different logits"
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB).double(), tokens[:, 1:].reshape(-1))
        loss.backward()
        tensors = {"logits": logits}
        summary = {}
        gen = generator(300 + index)
        for parameter_name, parameter in model.named_parameters():
            grad = parameter.grad
            if name in FULL_GRADIENTS:
                tensors[f"grad.{parameter_name}"] = grad
            # Entries that are exactly zero (embedding rows of absent tokens) would check nothing.
            nonzero = grad.flatten().nonzero().flatten()
            picks = nonzero[torch.randint(0, len(nonzero), (SAMPLES,), generator=gen)].tolist()
            summary[parameter_name] = {"norm": grad.double().norm().item(),
                                       "index": picks, "value": [grad.flatten()[i].item() for i in picks]}
        save_tensors(folder / "goldens.safetensors", tensors)
        save_json(folder / "goldens.json", {"tokens": tokens.tolist(), "loss": loss.item(), "gradients": summary})
        attentions = model(tokens, output_attentions=True).attentions
        peak = torch.stack([a.max(-1).values[:, :, TOKENS // 2:].mean() for a in attentions]).tolist()
        print(f"{name}: loss {loss.item():.4f}, logits std {logits.std():.3f}, mean largest attention weight per layer "
              f"{[round(p, 2) for p in peak]}")
