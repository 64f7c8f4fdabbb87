"""Train the demo model: `python -m bench.training.demo --out build/demo --seed 0 --minutes 64`.

Conversations of `bench.training.demo_data` and a small llama, trained from scratch with Muon and
AdamW on the assistant's tokens only. Configuration, tokenizer, chat template and sampling defaults
are those of the checkpoint in `--like`; its byte-level BPE has the same tokens for a word after a
space, a newline or a quote, so that copying a word never has to translate it. Every eight minutes
and at its end the run exports a checkpoint that `mlx_lm.load` reads. `tests/e2e/test_demo.py`
evaluates the one that is shipped; its card, MODEL.md, is written by hand.
"""

import argparse
import functools
import itertools
import json
import math
import shutil
import time
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
from tokenizers import Tokenizer

from bench.training import demo_data as data

END = "<|im_end|>"
LONGEST = 320  # tokens of a training sequence
SUM_WEIGHT = 6.0  # of a sum's result in the loss: one or two tokens among many that are easy
BATCH_TOKENS, EXPORT_S = 2048, 480.0
RATES = (0.02, 3e-3)  # of Muon and of AdamW
Render = Callable[[data.Example], str]


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

    def sample(self, ids: list[int]) -> Sample:
        weights = np.zeros(len(ids), np.float32)
        for i in itertools.chain(*self.answers(ids)):
            weights[i] = SUM_WEIGHT if self.equals in ids[max(0, i - 2) : i] else 1.0
        return np.array(ids, np.int32), weights

    def __call__(self, items: list[data.Example]) -> list[Sample]:
        texts = [self.render(item) for item in items]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self.sample(e.ids) for e in encoded]


@dataclass
class Batch:
    """Padded tokens, [rows, width]; the flat positions whose next token is wanted, with it."""

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array


def collate(samples: list[Sample]) -> Batch:
    width = max(len(own) for own, _ in samples)
    ids, weights = np.zeros((2, len(samples), width), np.float32)
    for row, sample in enumerate(samples):
        ids[row, : len(sample[0])], weights[row, : len(sample[0])] = sample
    positions = np.flatnonzero(weights[:, 1:])
    wanted = (
        mx.array(kind[:, 1:].reshape(-1)[positions]) for kind in (ids.astype(np.int32), weights)
    )
    return Batch(mx.array(ids[:, :-1].astype(np.int32)), mx.array(positions), *wanted)


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


def export(args: argparse.Namespace, model: Model) -> None:
    """Write everything that mlx_lm.load and transformers read."""
    shutil.copytree(args.like, args.out, dirs_exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(args.out / "model.safetensors"), weights, {"format": "mlx"})


def train(args: argparse.Namespace) -> None:
    """Train to the time or step limit, with exports on the way."""
    config = json.loads((args.like / "config.json").read_bytes())
    render = renderer((args.like / "chat_template.jinja").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(args.like / "tokenizer.json"))
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
            export(args, model)
            exported = time.monotonic()
    export(args, model)


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
