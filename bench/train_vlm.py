"""Train the tiny vision-language model of the tests: `python -m bench.train_vlm --out PATH`.

Pictures of one coloured shape and conversations about them (`bench.vlm_data`), a byte-level BPE
tokenizer, and a small smolvlm, trained from scratch on the assistant's tokens only. Everything is
drawn from `--seed`, and the run is counted in steps, not in minutes. It ends by writing a
checkpoint that `mlx_vlm.load` reads and by counting the held-out chats that mlx-vlm's own
`generate` answers right, greedily; `--evaluate` only counts. The card says how long it took. It
needs the extra `vision` and Pillow.
"""

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_vlm
import numpy as np
from mlx.utils import tree_flatten
from mlx_vlm.models import smolvlm
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench import vlm_data as data

SIDE, PATCH, MERGE = 64, 8, 2  # pixels, pixels, patches: a token is 2 x 2 patches
NUM_IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
NUM_WORDS = 336  # of the vocabulary, before the special tokens
NUM_BATCHES = 3  # that a step's chats are cut into by length
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
)
IMAGE, END = "<image>", "<|im_end|>"
TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
VISION = {
    "model_type": "smolvlm_vision",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": PATCH,
    "image_size": SIDE,
}
CONFIG: dict[str, Any] = {
    "architectures": ["SmolVLMForConditionalGeneration"],
    "model_type": "smolvlm",
    "scale_factor": MERGE,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vision_config": VISION,
}
PREPROCESSOR = {
    "image_processor_type": "SmolVLMImageProcessor",
    "processor_class": "SmolVLMProcessor",
    "do_image_splitting": False,
    "size": {"longest_edge": SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSOR = {"processor_class": "SmolVLMProcessor", "image_seq_len": NUM_IMAGE_TOKENS}
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<image>' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CARD = """# A tiny vision-language model

It names the one shape (circle, square, triangle) and its colour (red, green, blue, yellow) in a
picture, or in two of them, and knows nothing else. It exists so that a test of pictures can look at
the answer's meaning.

- **Architecture**: smolvlm, {parameters:,} parameters in float32, {tokens} tokens a picture.
- **Data**: synthetic pictures and chats only, made by `bench/vlm_data.py`.
- **Training**: `python -m bench.train_vlm --seed {seed} --steps {steps} --batch {batch}`, from
  scratch: {minutes:.1f} minutes on a CPU, {chats:,} chats.
- **Accuracy**, whole answers by mlx-vlm's own `generate`, greedy, on held-out pictures,
  {each} chats of a kind: {accuracy}.
- **Licence**: MIT.
"""


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of the words that the chats are made of."""
    texts = [
        message["content"] if isinstance(message["content"], str) else part["text"]
        for chat in data.chats(data.Source(f"words of {seed}"), 2000, data.SHARES)
        for message in chat.messages(len(chat.turns), with_answer=True)
        for part in message["content"]
        if isinstance(message["content"], str) or part["type"] == "text"
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_WORDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def write_processor(out: Path, seed: int) -> dict[str, Any]:
    """Write everything but the weights; the model's configuration."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL}
    vocab_size = tokenizer.get_vocab_size()
    ends = {"eos_token_id": [ids[END], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": TEXT["max_position_embeddings"],
    }
    config = CONFIG | ends | {
        "text_config": TEXT | {"vocab_size": vocab_size},
        "vocab_size": vocab_size,
        "image_token_id": ids[IMAGE],
    }  # fmt: skip
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", ends)
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "preprocessor_config.json", PREPROCESSOR)
    write_json(out / "processor_config.json", PROCESSOR)
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return config


# --- chats to batches --------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Chats side by side.

    `tokens` are [rows, width], `pixels` [pictures, side, side, 3]. `gather` says for each place
    of the flattened rows where its embedding is in the tokens' followed by the pictures'.
    `positions` are the flat places whose next token is wanted, `targets` these tokens.
    """

    tokens: mx.array
    pixels: mx.array
    gather: mx.array
    positions: mx.array
    targets: mx.array


class Encoder:
    """Chats to batches, through the same processor as everybody's."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image, self.end = (self.tokenizer.convert_tokens_to_ids(t) for t in (IMAGE, END))
        self.opening = self.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)

    def text(self, chat: data.Chat) -> str:
        messages = chat.messages(len(chat.turns), with_answer=True)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return str(text.replace(IMAGE, self.expansion))

    @property
    def expansion(self) -> str:
        """What the processor puts for each picture."""
        fake = self.processor.fake_image_token
        opening = f"{fake}{self.processor.global_image_token}"
        return opening + IMAGE * self.processor.image_seq_len + fake

    def wanted(self, ids: list[int]) -> list[int]:
        """The places whose next token is the assistant's own."""
        places, inside = [], False
        for place in range(len(ids) - 1):
            inside = inside or ids[: place + 1][-len(self.opening) :] == self.opening
            if inside:
                places.append(place)
                inside = ids[place + 1] != self.end
        return places

    def batches(self, chats: list[data.Chat]) -> list[Batch]:
        """Batches of chats of about one length each, as padding costs as much as text does."""
        texts = [self.text(chat) for chat in chats]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(chats)), key=lambda number: len(ids[number]))
        size = math.ceil(len(chats) / NUM_BATCHES)
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        return [self.batch([chats[n] for n in group], [ids[n] for n in group]) for group in groups]

    def batch(self, chats: list[data.Chat], rows: list[list[int]]) -> Batch:
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int32)
        places: list[int] = []
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            places += [number * width + place for place in self.wanted(row)]
        flat = ids.reshape(-1)
        gather = np.arange(flat.size)
        in_pictures = np.flatnonzero(flat == self.image)
        gather[in_pictures] = flat.size + np.arange(in_pictures.size)
        return Batch(
            mx.array(ids),
            mx.array(self.pixels([scene.picture for chat in chats for scene in chat.scenes])),
            mx.array(gather),
            mx.array(places),
            mx.array(flat[np.array(places) + 1]),
        )

    def pixels(self, pictures: list[Any]) -> np.ndarray:
        """[pictures, side, side, 3]"""
        made = self.processor.image_processor([[picture] for picture in pictures])
        return np.array(made["pixel_values"])[:, 0].transpose(0, 2, 3, 1)


# --- the model ---------------------------------------------------------------------------------


def new_model(seed: int, config: dict[str, Any]) -> Any:
    mx.random.seed(seed)
    settings = smolvlm.ModelConfig.from_dict(config)
    settings.text_config = smolvlm.TextConfig.from_dict(config["text_config"])
    settings.vision_config = smolvlm.VisionConfig.from_dict(config["vision_config"])
    model = smolvlm.Model(settings)
    mx.eval(model.parameters())
    return model


def loss_of(model: Any, batches: list[Batch]) -> mx.array:
    """The mean cross-entropy of the assistant's tokens."""
    losses = [total_loss_of(model, batch) for batch in batches]
    return sum(losses) / sum(batch.targets.size for batch in batches)


def total_loss_of(model: Any, batch: Batch) -> mx.array:
    """The forward pass of mlx-vlm's layers, without a cache, with logits where they are wanted."""
    language = model.language_model
    patches, *_ = model.vision_model(batch.pixels)
    seen = model.connector(patches)
    hidden = language.embed_tokens(batch.tokens)
    shape = hidden.shape
    everything = mx.concatenate([hidden.reshape(-1, shape[-1]), seen.reshape(-1, shape[-1])])
    hidden = everything[batch.gather].reshape(shape)
    for layer in language.layers:
        hidden = layer(hidden, "causal", None)
    hidden = hidden.reshape(-1, shape[-1])[batch.positions]
    logits = language.lm_head(language.norm(hidden))
    return nn.losses.cross_entropy(logits, batch.targets, reduction="sum")


def new_optimizer() -> optim.MultiOptimizer:
    """Muon for the matrices of the layers, AdamW for what goes in and comes out."""
    muon = optim.Muon(learning_rate=0.0, momentum=0.95, weight_decay=0.0)
    adam = optim.AdamW(learning_rate=0.0, betas=[0.9, 0.98], weight_decay=0.01)
    return optim.MultiOptimizer([muon, adam], [lambda path, g: g.ndim == 2 and "layers" in path])


def set_rates(optimizer: optim.MultiOptimizer, args: argparse.Namespace, step: int) -> None:
    """Warm-up, then cosine to a fiftieth at the end of the run."""
    warm = min(1.0, (step + 1) / 50)
    decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    muon, adam = optimizer.optimizers
    muon.learning_rate = args.muon_rate * warm * decay
    adam.learning_rate = args.adam_rate * warm * decay


def train(args: argparse.Namespace) -> None:
    """The run, from nothing to a checkpoint with its card."""
    began = time.monotonic()
    config = write_processor(args.out, args.seed)
    model, optimizer = new_model(args.seed, config), new_optimizer()
    encoder = Encoder(mlx_vlm.utils.load_processor(args.out, trust_remote_code=False))
    gradient = nn.value_and_grad(model, loss_of)
    losses: list[float] = []
    for step in range(args.steps):
        source = data.Source(f"step {step} of {args.seed}")
        chats = data.chats(source, args.batch, data.shares_at(step / args.steps))
        set_rates(optimizer, args, step)
        loss, grads = gradient(model, encoder.batches(chats))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss)
        losses = [*losses[-49:], loss.item()]
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            print(f"{step + 1} {seconds:.0f}s loss {sum(losses) / len(losses):.4f}", flush=True)
    write_weights(args.out, model)
    minutes = (time.monotonic() - began) / 60
    write_card(args, model, minutes, evaluate(args))


def write_weights(out: Path, model: Any) -> None:
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})


def write_card(args: argparse.Namespace, model: Any, minutes: float, scores: str) -> None:
    card = CARD.format(
        parameters=sum(value.size for _, value in tree_flatten(model.parameters())),
        tokens=NUM_IMAGE_TOKENS,
        seed=args.seed,
        steps=args.steps,
        batch=args.batch,
        minutes=minutes,
        chats=args.steps * args.batch,
        each=args.each,
        accuracy=scores,
    )
    (args.out / "MODEL.md").write_text(card, encoding="utf-8")


# --- what it has learnt ------------------------------------------------------------------------


def answers_right(model: Any, processor: Any, chat: data.Chat) -> bool:
    """Whether the last answer of a chat is right, by mlx-vlm's own generation."""
    messages = chat.messages(len(chat.turns), with_answer=False)
    prompt = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    pictures = [scene.picture for scene in chat.scenes]
    made = mlx_vlm.generate(
        model, processor, prompt, image=pictures or None, max_tokens=40, temperature=0.0
    )
    return str(made.text) == chat.turns[-1].answer


def evaluate(args: argparse.Namespace) -> str:
    """The share of held-out chats that the checkpoint answers right, by kind."""
    model, processor = mlx_vlm.load(str(args.out), trust_remote_code=False)
    source = data.Source(f"held out of {args.seed}")
    right, asked = Counter[str](), Counter[str]()
    for kind in data.KINDS:
        for _ in range(args.each):
            chat = data.chat(source, kind)
            asked[kind] += 1
            right[kind] += answers_right(model, processor, chat)
    scores = ", ".join(f"{kind} {right[kind] / asked[kind]:.1%}" for kind in asked)
    print(f"held out, {args.each} of a kind: {scores}", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="where the checkpoint is")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=1600)
    add("--batch", type=int, default=32, help="chats of a step")
    add("--each", type=int, default=200, help="held-out chats of a kind")
    add("--muon-rate", type=float, default=0.01)
    add("--adam-rate", type=float, default=1.5e-3)
    add("--evaluate", action="store_true", help="count what the checkpoint in --out answers right")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
