"""Checkpoints that recite: each token is followed by one other, whatever came before it.

The last token of a prompt is a cue, and a script answers to it, piece by piece; the margin of each
choice is so wide that no kernel, seed or penalty changes it. What a script may hold is any text,
so that formats which no tiny trained model writes (harmony, broken calls, half a character) are on
the wire all the same. A network of this kind is a qwen3 whose layer adds nothing: the embedding is
one-hot, and the last layer is the table of what follows.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

END = "<|im_end|>"
LOGIT = 2.0  # times the root of the width: about 40 against 0


def cue(name: str) -> str:
    """The token that a script answers to."""
    return f"<|cue:{name}|>"


def save_parrot(
    path: Path,
    scripts: Mapping[str, Sequence[str]],
    *,
    specials: Iterable[str] = (),
    template: str | None,
    loops: Iterable[str] = (),
    **settings: Any,
) -> Path:
    """A checkpoint with a script for each cue; those in `loops` have no end.

    A piece is one token, unless it is a single byte's character of the alphabet `Ā`, `ā`, … of
    byte-level tokenizers. No piece may be in two places.
    """
    import mlx.core as mx

    path.mkdir(parents=True)
    cues = [cue(name) for name in scripts]
    pieces = [piece for script in scripts.values() for piece in script]
    assert len(set(pieces)) == len(pieces), "a token has one successor"
    ids = _save_tokenizer(path, [END, *specials, *cues], pieces, template)
    width = -(-len(ids) // 64) * 64
    follows = mx.zeros((len(ids), width))
    for name, script in scripts.items():
        chain = [cue(name), *script, script[0] if name in loops else END]
        for token, following in itertools.pairwise(chain):
            follows[ids[following], ids[token]] = LOGIT
    _save_network(path, follows, settings)
    return path


def _save_tokenizer(
    path: Path, specials: Sequence[str], pieces: Sequence[str], template: str | None
) -> dict[str, int]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    new = [piece for piece in pieces if piece not in vocab and piece not in specials]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in new])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    if template is not None:
        settings["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return dict(tokenizer.get_vocab())


def _save_network(path: Path, follows: Any, changes: Mapping[str, Any]) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    num_tokens, width = follows.shape
    settings = {
        "model_type": "qwen3",
        "hidden_size": width,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": num_tokens,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        **changes,
    }
    (path / "config.json").write_text(json.dumps(settings))
    network = qwen3.Model(qwen3.ModelArgs.from_dict(settings))
    weights = dict(tree_flatten(network.parameters()))
    for name, array in weights.items():
        is_norm = "norm" in name
        weights[name] = mx.ones_like(array) if is_norm else mx.zeros_like(array)
    weights["model.embed_tokens.weight"] = mx.eye(num_tokens, width)
    weights["lm_head.weight"] = follows
    mx.save_safetensors(str(path / "model.safetensors"), weights)
