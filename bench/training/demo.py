"""Train the demo model: `python -m bench.training.demo --out build/demo --seed 0 --minutes 64`.

Conversations of `bench.training.demo_data`, a byte-level BPE made for copying, and a small llama
trained with Muon and AdamW on the assistant's tokens only. Configuration, chat template and
sampling defaults are those of the checkpoint in `--like`. Every eight minutes and at its end the
run counts the held-out conversations that it answers without a wrong token and exports a checkpoint
that `mlx_lm.load` reads; its card, MODEL.md, is written by hand from what the run prints.
"""

import argparse
import functools
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.training import demo_data as data

END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = [PAD, "<|im_start|>", END]
MARKERS = [
    f"<{slash}{t}>" for t in ("think", "tool_call", "tool_response", "tools") for slash in ("", "/")
]
# Only these many words have a token with a leading space. All others are the same tokens after a
# space, a newline or a quote, so that copying a word never has to translate it into other tokens.
SPACED = 100
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
LONGEST = 320  # tokens of a training sequence
SUM_WEIGHT = 6.0  # of a sum's result in the loss: one or two tokens among many that are easy
BATCH_TOKENS, EXPORT_S = 2048, 480.0
RATES = (0.02, 3e-3)  # of Muon and of AdamW
Render = Callable[[data.Example], str]


# --- tokens -----------------------------------------------------------------------------------


def renderer(template: str) -> Render:
    """Whole conversations to text, by the chat template as transformers compiles it."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    compiled = env.from_string(template)

    def render(item: data.Example) -> str:
        settings = {"add_generation_prompt": True, "enable_thinking": item.thinking}
        prompt = compiled.render(messages=item.messages, tools=item.tools, **settings)
        return prompt + item.target + f"{END}\n"

    return render


def train_tokenizer(render: Render, seed: int, vocab_size: int) -> Tokenizer:
    """A byte-level BPE over words without their space, then the spaced forms of frequent words."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), bytes_])
    texts = [render(item) for item in data.examples(data.Source(seed), 12000, data.MIX)]
    for marker in SPECIAL + MARKERS:
        texts = [text.replace(marker, "\n") for text in texts]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL + MARKERS) - SPACED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text.replace(" ", "\n") for text in texts), trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab, merges = learned["vocab"], [(left, right) for left, right in learned["merges"]]
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    spaced = [p for p, _ in counts.most_common() if p[0] == "Ġ" and p[1:] in vocab]
    for piece in spaced[:SPACED]:
        vocab[piece] = len(vocab)
        merges.append(("Ġ", piece[1:]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    return tokenizer


Sample = tuple[np.ndarray, np.ndarray]  # ids [length], weights in the loss: 0 in the prompt


class Encoder:
    """Conversations to samples."""

    def __init__(self, render: Render, tokenizer: Tokenizer) -> None:
        self.render, self.tokenizer = render, tokenizer
        self.opening = tokenizer.encode("<|im_start|>assistant\n").ids
        self.thinking = tokenizer.encode("<think>\n").ids
        self.end = tokenizer.token_to_id(END)
        self.equals = tokenizer.encode(" =").ids[-1]

    def answers(self, ids: list[int]) -> Iterator[range]:
        """The places of each answer, `<|im_end|>` included, without a `<think>` of the prompt."""
        n, skipped = len(self.opening), len(self.thinking)
        for start in range(n, len(ids)):
            if ids[start - n : start] == self.opening:
                has_thought = ids[start : start + skipped] == self.thinking
                yield range(start + skipped * has_thought, ids.index(self.end, start) + 1)

    def sample(self, ids: list[int], *, is_last_only: bool) -> Sample:
        weights = np.zeros(len(ids), np.float32)
        for answer in list(self.answers(ids))[-1 if is_last_only else 0 :]:
            for i in answer:
                weights[i] = SUM_WEIGHT if self.equals in ids[max(0, i - 2) : i] else 1.0
        return np.array(ids, np.int32), weights

    def __call__(self, items: list[data.Example], *, is_last_only: bool = False) -> list[Sample]:
        texts = [self.render(item) for item in items]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self.sample(e.ids, is_last_only=is_last_only) for e in encoded]


@dataclass
class Batch:
    """Padded tokens, [rows, width]; the flat positions whose next token is wanted, with it."""

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    rows: np.ndarray  # of each position


def collate(samples: list[Sample]) -> Batch:
    width = max(len(own) for own, _ in samples)
    ids, weights = np.zeros((2, len(samples), width), np.float32)
    for row, sample in enumerate(samples):
        ids[row, : len(sample[0])], weights[row, : len(sample[0])] = sample
    positions = np.flatnonzero(weights[:, 1:])
    wanted = (
        mx.array(kind[:, 1:].reshape(-1)[positions]) for kind in (ids.astype(np.int32), weights)
    )
    rows = positions // (width - 1)
    return Batch(mx.array(ids[:, :-1].astype(np.int32)), mx.array(positions), *wanted, rows)


def batches(samples: list[Sample], num_tokens: int) -> list[Batch]:
    """Batches of about `num_tokens`, each of sequences of about one length."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: len(sample[0])):
        if (len(groups[-1]) + 1) * len(sample[0]) > num_tokens:
            groups.append([])
        groups[-1].append(sample)
    return [collate(group) for group in groups if group]


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    fraction: float = 0.0


def stream(encoder: Encoder, seed: int, progress: Progress) -> Iterator[Batch]:
    """Endless training batches; the mix of skills follows the progress of the run."""
    for chunk in itertools.count(1):
        source = data.Source(seed * 1_000_003 + chunk)
        samples = encoder(data.examples(source, 1200, data.mix_at(progress.fraction)))
        made = batches([s for s in samples if len(s[0]) <= LONGEST + 1], BATCH_TOKENS)
        source.rng.shuffle(made)
        yield from made


# --- the model --------------------------------------------------------------------------------


def new_model(seed: int, config: dict[str, Any]) -> Model:
    """A model whose attention starts out looking for equal tokens and copying them."""
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    embedding = model.model.embed_tokens
    embedding.weight = mx.random.normal(embedding.weight.shape) * 0.02
    for layer in model.layers:
        attention = layer.self_attn
        attention.k_proj.weight = 0.7 * attention.q_proj.weight + 0.7 * attention.k_proj.weight
        attention.o_proj.weight = 0.7 * attention.v_proj.weight.T + 0.3 * attention.o_proj.weight
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * 0.3
    mx.eval(model.parameters())
    return model


def logits_at(model: Model, batch: Batch) -> mx.array:
    """[wanted, vocabulary]: of the wanted positions only."""
    hidden = model.model(batch.tokens).flatten(0, 1)[batch.positions]
    return model.model.embed_tokens.as_linear(hidden)


def loss_of(model: Model, batch: Batch) -> mx.array:
    losses = nn.losses.cross_entropy(logits_at(model, batch), batch.targets)
    return (losses * batch.weights).sum() / batch.weights.sum()


def new_optimizer() -> optim.MultiOptimizer:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    muon = optim.Muon(learning_rate=0.0, momentum=0.95, weight_decay=0.0)
    adam = optim.AdamW(learning_rate=0.0, betas=[0.9, 0.98], weight_decay=0.01)
    return optim.MultiOptimizer([muon, adam], [lambda path, g: g.ndim == 2 and "layers" in path])


def set_rates(optimizer: optim.MultiOptimizer, progress: Progress) -> None:
    """Warm-up, then cosine to a twentieth at the end of the run."""
    warm = min(1.0, (progress.step + 1) / 100)
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress.fraction)))
    for part, rate in zip(optimizer.optimizers, RATES, strict=True):
        part.learning_rate = rate * warm * decay


def evaluate(model: Model, encoder: Encoder, seed: int, each: int) -> dict[str, float]:
    """The share of held-out conversations of each skill whose answer has no wrong token."""
    source, scores = data.Source(seed + 77, evaluate=True), {}
    for skill in data.MIX:
        items = [data.example(source, skill) for _ in range(each)]
        num_right = 0
        for batch in batches(encoder(items, is_last_only=True), 4096):
            wrong = np.array(mx.argmax(logits_at(model, batch), axis=-1) != batch.targets)
            num_wrong = np.bincount(batch.rows, wrong, minlength=batch.tokens.shape[0])
            num_right += int((num_wrong == 0).sum())
        scores[skill] = num_right / each
    return scores


# --- the run ----------------------------------------------------------------------------------


def export(
    args: argparse.Namespace, model: Model, encoder: Encoder, progress: Progress, num_each: int
) -> None:
    """Evaluate, and write everything that mlx_lm.load and transformers read."""
    scores = evaluate(model, encoder, args.seed, num_each)
    accuracy = ", ".join(f"{skill} {share:.0%}" for skill, share in scores.items())
    print(f"{progress}; held out: {accuracy}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(args.out / "model.safetensors"), weights, {"format": "mlx"})
    encoder.tokenizer.save(str(args.out / "tokenizer.json"))
    end, pad = (encoder.tokenizer.token_to_id(token) for token in (END, PAD))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((args.like / name).read_bytes())
        settings |= {"eos_token_id": [end, pad], "pad_token_id": pad}
        (args.out / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (args.out / name).write_bytes((args.like / name).read_bytes())


def train(args: argparse.Namespace) -> None:
    """Train to the time or step limit, with evaluation and export on the way."""
    config = json.loads((args.like / "config.json").read_bytes())
    render = renderer((args.like / "chat_template.jinja").read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(render, args.seed, config["vocab_size"])
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    encoder, progress = Encoder(render, tokenizer), Progress()
    model, optimizer = new_model(args.seed, config), new_optimizer()
    gradient = nn.value_and_grad(model, loss_of)
    began = exported = time.monotonic()

    for batch in stream(encoder, args.seed, progress):
        progress.seconds = time.monotonic() - began
        limit = args.steps or 60 * args.minutes
        progress.fraction = (progress.step if args.steps else progress.seconds) / limit
        if progress.fraction >= 1.0:
            break
        set_rates(optimizer, progress)
        loss, grads = gradient(model, batch)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss)
        progress.step += 1
        progress.tokens += batch.tokens.size
        if progress.step % 25 == 0:
            print(f"{progress}, loss {loss.item():.3f}", flush=True)
        if time.monotonic() - exported > EXPORT_S:
            export(args, model, encoder, progress, num_each=32)
            exported = time.monotonic()
    export(args, model, encoder, progress, num_each=128)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.demo")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="where the model is exported")
    add("--like", type=Path, default=Path("mlxlite/demo"), help="a checkpoint of the same kind")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=64.0, help="length of the run")
    add("--steps", type=int, default=0, help="length of the run in steps, instead of minutes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
