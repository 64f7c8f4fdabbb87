"""Checkpoints for tests: tiny random models with a tokenizer, saved as mlx-lm reads them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mlxlite.models.load import LoadedModel

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% else %}[silent]{% endif %}"
    "{{ messages[0].content }}"
)
HELLO = [{"role": "user", "content": "Hello"}]
IM_END = 322  # of the tokenizer that is saved here, like every id
NUM_TOKENS = 323
SECRET = "hf_aVerySecretTokenThatNobodyMaySee"
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, how are you? 0 1 2 3 4 5 6 7 8 9",
    "A stream of tokens; a batch of rows. Ein Satz mit Umlauten: äöüß. 日本語のテキスト 🙂🙃",
]


def save_tokenizer(path: Path, template: str | None = CHAT_TEMPLATE) -> int:
    """Train and save a byte-level BPE tokenizer; its vocabulary's size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer.save(str(path / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    if template is not None:
        settings["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def save_checkpoint(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A random qwen3 of 2 layers, hidden 64, in float32, as mlx-lm reads it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": save_tokenizer(path),
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    } | changes
    (path / "config.json").write_text(json.dumps(settings))
    mx.random.seed(seed)
    network = qwen3.Model(qwen3.ModelArgs.from_dict(settings))
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def edit(path: Path, **changes: Any) -> Path:
    """Change settings of a JSON file, made if need be; None drops one. Gives its directory."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    path.write_text(json.dumps(settings))
    return path.parent


def loaded(path: Path | str, **flags: Any) -> "LoadedModel":
    """A checkpoint as the server has it, without its network."""
    from mlxlite.config.options import Config
    from mlxlite.models.load import load

    return load(Config(model=str(path), **flags))[1]


def complaint(name: Path | str, **flags: Any) -> str:
    """The message of the LoadError for an unusable model: one line of bounded length."""
    from mlxlite.models.interface import LoadError

    with pytest.raises(LoadError) as caught:
        loaded(name, **flags)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert SECRET not in text
    assert len(text) < 1000
    return text
