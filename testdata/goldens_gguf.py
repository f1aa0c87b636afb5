"""Goldens of the weights crate: dequantised blocks, a tiny GGUF with its Hugging Face tensors, tokenizer ids."""

import io
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Q
from goldens_common import save_json, save_tensors
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SEED = 20_240_601
QUANTISED = [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q4_K, Q.Q5_K, Q.Q6_K]
# Where the f16 scales lie in a block of the formats gguf cannot quantise to.
SCALES = {Q.Q4_K: [0, 2], Q.Q5_K: [0, 2], Q.Q6_K: [208]}

TEXT = """The recurrent heads keep a constant state, and the attention heads keep a cache that grows with every token.
In 2024, 135 million parameters were enough: 9 heads, 3 groups, 64 values per head. don't we'll they've it's
def forward(self, x):\n    return self.o_proj(x) + x\n\n\tfor i in range(10):  print(i)
naïve café, “quoted” — 日本語 русский ½ x² 🎉 """ * 3
CASES = [
    "", " ", "The attention heads", "  two  spaces\n\nand lines\t tab ", "In 1999, 12345 + 67 = 12412.", "1 2  33 444 5a6b",
    "naïve café — “quoted” … 日本語 русский 🎉👩‍👧", "def f(x):\n    return x**2  # heads\n\n\n", "don't WE'LL they've I'M it's",
    "x²³ ½ ٣ Ⅷ ①", "a\r\nb\u00a0c\u200bd ", "<|im_start|>user\nHi<|im_end|><|end|> <think>", "e\u0301 É", "\x00\x01\x7f", "....'s",
]
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>", "<think>"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def quants(out: Path) -> None:
    rng = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(str(out / "quants.gguf"), "none")
    expected = {}
    for kind in [Q.F32, Q.F16, Q.BF16, *QUANTISED]:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind in SCALES:
            data = rng.integers(0, 256, (2, 512 // block, size), dtype=np.uint8)
            for at in SCALES[kind]:
                scale = rng.normal(0, 0.01, data.shape[:2]).astype(np.float16)
                data[:, :, at : at + 2] = scale[..., None].view(np.uint8)
            data = data.reshape(2, -1)
        else:
            data = gguf.quants.quantize(rng.normal(0, 1, (2, 512)).astype(np.float32), kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_tensors(out / "quants.safetensors", expected)


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k of llama models."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(theta: float, dim: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """What llama.cpp's converter writes into `rope_freqs.weight`."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (i / dim)
        if wavelength < context / high:
            out.append(1.0)
        elif wavelength > context / low:
            out.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


def tiny(out: Path, vocab: list[str], merges: list[str]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    d_model, d_ff, heads, kv_heads, head_dim = 32, 48, 4, 2, 16
    draw = lambda *shape: (torch.randn(*shape, generator=generator) * 0.1).half().float()  # noqa: E731
    shapes = {
        "attn_norm": (d_model,), "attn_q": (heads * head_dim, d_model), "attn_k": (kv_heads * head_dim, d_model),
        "attn_v": (kv_heads * head_dim, d_model), "attn_output": (d_model, heads * head_dim), "ffn_norm": (d_model,),
        "ffn_gate": (d_ff, d_model), "ffn_up": (d_ff, d_model), "ffn_down": (d_model, d_ff),
    }
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    hf = {"model.embed_tokens.weight": draw(len(vocab), d_model), "model.norm.weight": draw(d_model)}
    stored = {"token_embd.weight": hf["model.embed_tokens.weight"], "output_norm.weight": hf["model.norm.weight"]}
    for name, shape in shapes.items():
        weight = draw(*shape)
        hf[f"model.layers.0.{names[name]}.weight"] = weight
        turned = {"attn_q": heads, "attn_k": kv_heads}.get(name)
        stored[f"blk.0.{name}.weight"] = weight if turned is None else permute(weight, turned)
    writer = gguf.GGUFWriter(str(out / "tiny_llama.gguf"), "llama")
    writer.add_context_length(16384)
    writer.add_embedding_length(d_model)
    writer.add_block_count(1)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3, 3, 3, 4] + [1] * (len(vocab) - 4))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    factors = llama3_factors(10_000.0, head_dim, 8.0, 1.0, 16.0, 512)
    writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in stored.items():
        half = name.endswith("proj.weight") or "attn_" in name and tensor.dim() == 2
        writer.add_tensor(name, tensor.numpy().astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_tensors(out / "tiny_llama.safetensors", hf)


def trained() -> tuple[list[str], list[str], Tokenizer]:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainer)
    data = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(data["vocab"], key=data["vocab"].get)
    return vocab, [" ".join(merge) for merge in data["merges"]], tokenizer


def byte_level(out: Path, vocab: list[str], merges: list[str], tokenizer: Tokenizer) -> None:
    split = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")  # noqa: E731
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds = {
        "gpt-2": (gpt2, None, False),
        "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), None, False),
        "llama-bpe": (pre_tokenizers.Sequence([split(LLAMA3), bytes_only]), None, True),
        "qwen2": (pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), bytes_only]), normalizers.NFC(), False),
    }
    expected = {}
    for name, (pre, normalizer, whole) in kinds.items():
        data = json.loads(tokenizer.to_str())
        data["model"]["ignore_merges"] = whole
        one = Tokenizer.from_str(json.dumps(data))
        one.pre_tokenizer = pre
        if normalizer is not None:
            one.normalizer = normalizer
        expected[name] = [one.encode(text, add_special_tokens=False).ids for text in CASES]
    save_json(out / "byte_level.json", {"tokens": vocab, "merges": merges, "texts": CASES, "ids": expected})


def sentence_piece(out: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, split_digits=True,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = processor.vocab_size()
    kind = lambda i: 6 if processor.is_byte(i) else 2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 1  # noqa: E731
    # U+0000 ends sentencepiece's C strings in some versions; an empty text gives no tokens there, and a lone space here.
    texts = [text for text in CASES if text and "\x00" not in text and "<" not in text]
    save_json(out / "sentence_piece.json", {
        "tokens": [processor.id_to_piece(i) for i in range(n)],
        "scores": [struct.unpack("f", struct.pack("f", processor.get_score(i)))[0] for i in range(n)],
        "types": [kind(i) for i in range(n)],
        "texts": texts,
        "ids": [processor.encode(text) for text in texts],
    })


def make(out: Path) -> None:
    """Writes all of them into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    quants(out)
    vocab, merges, tokenizer = trained()
    tiny(out, vocab, merges)
    byte_level(out, vocab, merges, tokenizer)
    sentence_piece(out)
