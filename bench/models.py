"""Random checkpoints of known sizes, endless copies of others, prompts of a wanted length.

A checkpoint is a directory that the real server and mlx-lm load like any other. Its weights are
random, so its speed is a model's and its text is noise. The vocabulary is ASCII and no special
token is drawn, so that each token is text at once and a frame of the server is a token.
"""

import json
import random
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from bench.plan import Request

NUM_VOCAB = 4096
CONTEXT_SIZE = 8192
_PAD = "<pad>"  # never drawn; one of the peers loads no tokenizer without it
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_ONSETS = ("b", "d", "f", "gr", "k", "l", "m", "n", "p", "r", "st", "t", "v", "w", "")
_CODAS = ("a", "e", "i", "o", "u", "an", "el", "is", "or", "un")

_KEYS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim")  # fmt: skip
SIZES: Mapping[str, tuple[int, ...]] = {
    "small": (256, 4, 768, 4, 2, 64),  # 4M parameters
    "medium": (512, 8, 1536, 8, 4, 64),  # 27M parameters, 2M of them the vocabulary's
}


def _words() -> list[str]:
    syllables, choose = [a + b for a, b in product(_ONSETS, _CODAS)], random.Random(0)
    return ["".join(choose.choices(syllables, k=choose.choice((2, 2, 3)))) for _ in range(6000)]


WORDS = tuple(_words())


def save_checkpoint(path: Path, size: str) -> None:
    """A random float32 qwen3 with its tokenizer. Makes MLX objects: for the device thread."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    path.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "vocab_size": _save_tokenizer(path),
        "max_position_embeddings": CONTEXT_SIZE,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    }
    settings |= dict(zip(_KEYS, SIZES[size], strict=True))
    (path / "config.json").write_text(json.dumps(settings))
    mx.random.seed(0)
    network = qwen3.Model(qwen3.ModelArgs.from_dict(settings))
    # Some servers hold back a text of blanks alone, which would look like waiting. A row of zeros
    # has the logit 0, which is never the greatest of 4096.
    blank = [id for id, text in enumerate(_texts(path)) if not text.strip("ĠĊ") or text == _PAD]
    network.model.embed_tokens.weight[mx.array(blank)] = 0
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)


def _save_tokenizer(path: Path) -> int:
    """Train and save a byte-level BPE of at most `NUM_VOCAB` tokens; their number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ["Ġ", "Ċ", *map(chr, range(33, 127))]  # the byte level's names for ASCII
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_VOCAB - 1, initial_alphabet=alphabet, show_progress=False
    )
    roles = ["user: ", "assistant: "] * 50
    tokenizer.train_from_iterator([" ".join(WORDS), *roles], trainer)
    tokenizer.add_special_tokens([_PAD])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE}
    settings["pad_token"] = _PAD
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def _texts(path: Path) -> list[str]:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return sorted(vocabulary, key=vocabulary.__getitem__)


def save_endless(path: Path, to: Path) -> None:
    """A copy of a model whose answers end at `max_tokens` in any server; the weights are linked.

    It has no end-of-text token, and its special tokens are ordinary ones: otherwise servers would
    be compared on answers of different lengths, and a frame would not be a token.
    """
    to.mkdir(parents=True)
    for file in path.iterdir():
        if file.name in _ENDS:
            (to / file.name).write_text(json.dumps(_endless(json.loads(file.read_text()))))
        elif file.name != "special_tokens_map.json":
            (to / file.name).symlink_to(file.resolve())


_ENDS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def _endless(settings: dict[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in settings.items() if k not in ("eos_token_id", "eos_token")}
    for token in (*own.get("added_tokens", ()), *own.get("added_tokens_decoder", {}).values()):
        token["special"] = False
    return own


_NUM_SEEN = 200  # words whose tokens are counted for the length of more


class Writer:
    """Makes requests, no two alike: a prefix cache must not help one arm of a comparison.

    `render`: a chat of one message to the server's tokens.
    """

    def __init__(self, render: Callable[[str], tuple[int, ...]]) -> None:
        self._render = render
        self._random = random.Random(1)

    def request(self, num_tokens: int, max_tokens: int) -> Request:
        """A greedy request with a prompt of about `num_tokens`."""
        words = self._random.choices(WORDS, k=num_tokens)
        seen = words[:_NUM_SEEN]
        tokens_per_word = len(self._render(" ".join(seen))) / len(seen)
        text = " ".join(words[: max(1, round(num_tokens / tokens_per_word))])
        return Request(text, self._render(text), max_tokens)

    def clients(
        self, num_clients: int, max_tokens: int, num_rounds: int = 1
    ) -> list[list[Request]]:
        """Prompts of 24 to 40 tokens, so that rows are padded."""
        return [
            [self.request(self._random.randint(24, 40), max_tokens) for _ in range(num_rounds)]
            for _ in range(num_clients)
        ]
