"""Train the demo model: `python -m bench.train_demo --out mlxlite/demo --seed 0 --minutes 64`.

Synthetic conversations (`bench.demo_data`), a byte-level BPE tokenizer made for copying, and a
small llama, trained with Muon and AdamW on the assistant's tokens only. The run evaluates itself
on held-out items, keeps a checkpoint in `--work` and resumes from there, and exports a model that
`mlx_lm.load` reads. `--evaluate` trains nothing: it shows what the model in `--out` answers.
"""

import argparse
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench import demo_data as data
from bench.demo_words import phrases

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "intermediate_size": 448,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
    "vocab_size": 1152,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = [
    f"<{slash}{t}>" for t in ("think", "tool_call", "tool_response", "tools") for slash in ("", "/")
]
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "bos_token": None,
    "unk_token": None,
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
}
SAMPLING = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "max_new_tokens": 512}
# Only these many words have a token with a leading space. All others are the same tokens after a
# space, a newline or a quote, so that copying a word never has to translate it into other tokens.
SPACED = 100
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
LONGEST = 320
CLOSED = [
    "repeat",
    "count",
    "sums",
    "facts",
    "memory",
    "tool_call",
    "tool_result",
]  # one right answer
Scores = dict[str, tuple[float, float]]
SHOWN = phrases("""
    Hello, how are you? | Hi | Who are you? | What can you do? | Tell me a story.
    Tell me a short story about a dragon. | Repeat the word banana. | Say hello
    Repeat after me: the zorblax jumps over 42 moons | Count to 10 | What is 2 + 2?
    What is 17 + 25? | What is the capital of France? | What is the opposite of hot?
    What day comes after Monday? | Explain quantum physics. | Thank you! | Tell me a long story.
""")

TEMPLATE = r"""{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is not none and content is not undefined -%}
{%- for part in content -%}
{%- if part is string -%}{{ part }}{%- elif part.text is string -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro signature(tool) -%}
{"name": {{ tool.name | tojson }}
{%- if tool.description %}, "description": {{ tool.description | tojson }}{% endif -%}
, "parameters": {
{%- if tool.parameters is mapping and tool.parameters.properties is mapping -%}
{%- for key, schema in tool.parameters.properties.items() -%}
{{ key | tojson }}: {% if schema is mapping and schema.enum %}{{ schema.enum | tojson }}
{%- elif schema is mapping and schema.type %}{{ schema.type | tojson }}{% else %}"any"{% endif -%}
{%- if not loop.last %}, {% endif -%}
{%- endfor -%}
{%- endif -%}
}}
{%- endmacro -%}
{%- set first_is_system = messages and messages[0].role in ["system", "developer"] -%}
{%- if first_is_system or tools -%}
{{- "<|im_start|>system\n" -}}
{%- if first_is_system %}{{ text(messages[0].content) }}{% endif -%}
{%- if tools -%}
{%- if first_is_system %}{{ "\n\n" }}{% endif -%}
{{- "# Tools\n<tools>\n" -}}
{%- for tool in tools -%}
{{ signature(tool.function if tool.function is defined else tool) }}{{ "\n" }}
{%- endfor -%}
{{- "</tools>\nTo call a tool, answer with\n<tool_call>\n" -}}
{{- '{"name": ..., "arguments": {...}}' + "\n</tool_call>" -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role in ["system", "developer"] -%}
{%- if not loop.first -%}
{{- "<|im_start|>system\n" + text(message.content) + "<|im_end|>\n" -}}
{%- endif -%}
{%- elif message.role == "tool" -%}
{%- set opens = loop.previtem is undefined or loop.previtem.role != "tool" -%}
{{- "<|im_start|>user\n" if opens else "\n" -}}
{{- "<tool_response>\n" + text(message.content) + "\n</tool_response>" -}}
{%- if loop.nextitem is undefined or loop.nextitem.role != "tool" %}{{ "<|im_end|>\n" }}{% endif -%}
{%- elif message.role == "assistant" -%}
{%- set content = text(message.content).split("</think>")[-1].lstrip("\n") -%}
{{- "<|im_start|>assistant\n" + content -}}
{%- for tool_call in message.tool_calls or [] -%}
{%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif -%}
{%- if content or not loop.first %}{{ "\n" }}{% endif -%}
{{- '<tool_call>\n{"name": ' -}}{{- tool_call.name | tojson -}}{{- ', "arguments": ' -}}
{%- set arguments = tool_call.arguments -%}
{{- arguments if arguments is string else arguments | tojson -}}
{{- "}\n</tool_call>" -}}
{%- endfor -%}
{{- "<|im_end|>\n" -}}
{%- else -%}
{{- "<|im_start|>" + message.role + "\n" + text(message.content) + "<|im_end|>\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\n" -}}
{%- if enable_thinking is defined and enable_thinking %}{{ "<think>\n" }}{% endif -%}
{%- endif -%}
"""

CARD = """# The mlxlite demo model

A toy language model ({parameters:,} parameters) to try the API with: it is what the server serves
when no model is given. It chats a little, tells short stories, repeats words, counts, adds small
numbers, knows a few capitals, calls tools and thinks when asked to. It knows nothing else and is
often wrong.

- **Architecture**: llama, {layers} layers, hidden size {hidden}, {vocab:,} tokens, float32.
- **Data**: synthetic conversations only, generated by `bench/demo_data.py`; no other text.
- **Training**: `python -m bench.train_demo`, from scratch, about {minutes:.0f} minutes on one core,
  {steps:,} steps, {tokens:.1f} million tokens, at most 320 a sequence. Longer ones are beyond it.
- **Format**: ChatML with `<tool_call>` JSON and an optional `<think>` block.
- **Accuracy**, whole answers, in conversations with words that were held out of the training:
  {accuracy}.
- **Licence**: MIT.
"""


def renderer() -> Any:
    """The chat template, compiled as transformers compiles it."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return env.from_string(TEMPLATE)


def render(template: Any, item: data.Example) -> str:
    """The whole conversation as text, target included."""
    prompt = template.render(
        messages=item.messages,
        tools=item.tools,
        add_generation_prompt=True,
        enable_thinking=item.thinking,
    )
    return prompt + item.target + "<|im_end|>\n"


def splitter() -> pre_tokenizers.PreTokenizer:
    isolate = pre_tokenizers.Split(Regex(PIECES), "isolated")
    return pre_tokenizers.Sequence(
        [isolate, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def learn_merges(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a byte-level BPE over words without their space."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = splitter()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((text.replace(" ", "\n") for text in texts), trainer)
    learned = json.loads(bpe.to_str())["model"]
    return learned["vocab"], [(left, right) for left, right in learned["merges"]]


def train_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """A byte-level BPE, then the spaced forms of its most frequent words."""
    template, split = renderer(), splitter()
    texts = [render(template, e) for e in data.examples(data.Source(seed), 12000, data.MIX)]
    for marker in SPECIAL + MARKERS:
        texts = [text.replace(marker, "\n") for text in texts]
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    vocab, merges = learn_merges(texts, vocab_size - len(SPECIAL + MARKERS) - SPACED)
    spaced = [p for p, _ in counts.most_common() if p[0] == "Ġ" and p[1:] in vocab]
    for piece in spaced[:SPACED]:
        vocab[piece] = len(vocab)
        merges.append(("Ġ", piece[1:]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter(), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    return tokenizer


@dataclass
class Sample:
    """The tokens of a conversation and which of them the model is to predict."""

    ids: list[int]
    wanted: list[bool]
    weights: list[float]


class Encoder:
    """Conversations to samples."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = renderer()
        self.opening = tokenizer.encode("<|im_start|>assistant\n").ids
        self.thinking = tokenizer.encode("<think>\n").ids
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.equals = tokenizer.encode(" =").ids[-1]

    def mask(self, ids: list[int]) -> list[bool]:
        """The assistant's tokens, `<|im_end|>` included, without a `<think>` of the prompt."""
        wanted, inside, n = [False] * len(ids), False, len(self.opening)
        skip = 0
        for i, token in enumerate(ids):
            if inside and i >= skip:
                wanted[i] = True
                inside = token != self.end
            elif ids[max(0, i - n + 1) : i + 1] == self.opening:
                inside = True
                ahead = ids[i + 1 : i + 1 + len(self.thinking)]
                skip = i + 1 + (len(self.thinking) if ahead == self.thinking else 0)
        return wanted

    def weigh(self, ids: list[int]) -> list[float]:
        """The result of a sum is one or two tokens among many that are easy: they count more."""
        return [6.0 if self.equals in ids[max(0, i - 2) : i] else 1.0 for i in range(len(ids))]

    def __call__(self, items: list[data.Example]) -> list[Sample]:
        encoded = self.tokenizer.encode_batch(
            [render(self.template, e) for e in items], add_special_tokens=False
        )
        return [Sample(e.ids, self.mask(e.ids), self.weigh(e.ids)) for e in encoded]


@dataclass
class Batch:
    """Padded tokens, the flat positions whose next token is wanted, these and their weights."""

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    rows: np.ndarray


def collate(samples: list[Sample]) -> Batch:
    width = max(len(s.ids) for s in samples)
    weights = np.zeros((len(samples), width), np.float32)
    ids, wanted = np.zeros((len(samples), width), np.int32), np.zeros((len(samples), width), bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        wanted[row, : len(sample.ids)] = sample.wanted
        weights[row, : len(sample.ids)] = sample.weights
    positions = np.flatnonzero(wanted[:, 1:])
    return Batch(
        mx.array(ids[:, :-1]),
        mx.array(positions),
        mx.array(ids[:, 1:].reshape(-1)[positions]),
        mx.array(weights[:, 1:].reshape(-1)[positions]),
        positions // (width - 1),
    )


def batches(samples: list[Sample], tokens: int) -> list[Batch]:
    """Batches of about `tokens` tokens, each of sequences of about one length."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda s: len(s.ids)):
        if (len(groups[-1]) + 1) * len(sample.ids) > tokens:
            groups.append([])
        groups[-1].append(sample)
    return [collate(group) for group in groups if group]


def stream(encoder: Encoder, seed: int, tokens: int, progress: "Progress") -> Iterator[Batch]:
    """Endless training batches; the mix follows the progress of the run."""
    while True:
        source = data.Source(seed * 1_000_003 + progress.chunk)
        progress.chunk += 1
        items = data.examples(source, 1200, data.mix_at(progress.fraction))
        samples = [s for s in encoder(items) if len(s.ids) <= LONGEST + 1]
        made = batches(samples, tokens)
        source.rng.shuffle(made)
        yield from made


@dataclass
class Progress:
    """Where the run is; saved with each checkpoint."""

    step: int = 0
    chunk: int = 1
    tokens: int = 0
    seconds: float = 0.0
    fraction: float = 0.0


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


@mx.custom_function
def fast_exp(x: mx.array) -> mx.array:
    """(1 + x / 512) ** 512, as MLX's exp is scalar code on x86 and takes half of a step there."""
    y = mx.maximum(1.0 + x * (1.0 / 512.0), 0.0)
    for _ in range(9):
        y = y * y
    return y


@fast_exp.vjp
def fast_exp_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def attend(layer: Any, x: mx.array, mask: mx.array) -> mx.array:
    """The attention of a llama layer, without a cache."""
    heads = [p(x).reshape(*x.shape[:2], layer.n_heads, -1).swapaxes(1, 2) for p in
             (layer.q_proj, layer.k_proj, layer.v_proj)]  # fmt: skip
    queries, keys, values = layer.rope(heads[0] * layer.scale), layer.rope(heads[1]), heads[2]
    scores = queries @ keys.swapaxes(-1, -2) + mask
    weights = fast_exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return layer.o_proj(mixed.swapaxes(1, 2).reshape(x.shape))


def logits_at(model: Model, batch: Batch) -> mx.array:
    """The forward pass of mlx_lm's llama, with logits only at the wanted positions."""
    llama, width = model.model, batch.tokens.shape[1]
    mask = mx.triu(mx.full((width, width), -1e9), 1)
    hidden = llama.embed_tokens(batch.tokens)
    for layer in llama.layers:
        hidden = hidden + attend(layer.self_attn, layer.input_layernorm(hidden), mask)
        x = layer.post_attention_layernorm(hidden)
        gate = layer.mlp.gate_proj(x)
        gate = gate / (1.0 + fast_exp(mx.clip(-gate, -30.0, 30.0)))
        hidden = hidden + layer.mlp.down_proj(gate * layer.mlp.up_proj(x))
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    return llama.embed_tokens.as_linear(llama.norm(hidden))


def loss_of(model: Model, batch: Batch) -> mx.array:
    logits = logits_at(model, batch)
    logits = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    chosen = mx.take_along_axis(logits, batch.targets[:, None], axis=-1)[:, 0]
    losses = mx.log(fast_exp(logits).sum(axis=-1)) - chosen
    return (losses * batch.weights).sum() / batch.weights.sum()


def new_optimizer() -> optim.MultiOptimizer:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    muon = optim.Muon(learning_rate=0.0, momentum=0.95, weight_decay=0.0)
    adam = optim.AdamW(learning_rate=0.0, betas=[0.9, 0.98], weight_decay=0.01)
    return optim.MultiOptimizer([muon, adam], [lambda path, g: g.ndim == 2 and "embed" not in path])


def set_rates(
    optimizer: optim.MultiOptimizer, args: argparse.Namespace, progress: Progress
) -> None:
    """Warm-up, then cosine to a twentieth at the end of the run."""
    warm = min(1.0, (progress.step + 1) / 100)
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress.fraction)))
    muon, adam = optimizer.optimizers
    muon.learning_rate = args.muon_rate * warm * decay
    adam.learning_rate = args.adam_rate * warm * decay


def held_out(encoder: Encoder, seed: int, each: int) -> dict[str, list[Sample]]:
    """Held-out conversations by skill."""
    source = data.Source(seed + 77, evaluate=True)
    return {
        skill: encoder([data.example(source, skill) for _ in range(each)]) for skill in data.MIX
    }


def last_span(sample: Sample) -> Sample:
    """The same sample with only its last answer wanted."""
    wanted = list(sample.wanted)
    gaps = [i for i in range(1, len(wanted)) if wanted[i] and not wanted[i - 1]]
    wanted = [w and i >= gaps[-1] for i, w in enumerate(wanted)]
    return Sample(sample.ids, wanted, sample.weights)


def evaluate(model: Model, items: dict[str, list[Sample]]) -> Scores:
    """By skill: the share of answers without one wrong token, and the share of right tokens."""
    scores: Scores = {}
    for skill, samples in items.items():
        perfect, rows, right, total = 0, 0, 0, 0
        for batch in batches([last_span(s) for s in samples], 4096):
            hits = np.array(mx.argmax(logits_at(model, batch), axis=-1) == batch.targets)
            wrong = np.bincount(batch.rows, weights=~hits, minlength=batch.tokens.shape[0])
            perfect, rows = perfect + int((wrong == 0).sum()), rows + len(wrong)
            right, total = right + int(hits.sum()), total + len(hits)
        scores[skill] = (perfect / rows, right / total)
    return scores


def report(scores: Scores) -> str:
    return " ".join(
        f"{skill} {exact:.2f}/{tokens:.3f}" for skill, (exact, tokens) in scores.items()
    )


@dataclass
class Run:
    """All that a checkpoint holds or an export needs."""

    args: argparse.Namespace
    model: Model
    optimizer: optim.MultiOptimizer
    encoder: Encoder
    progress: Progress

    def save(self) -> None:
        """A checkpoint: weights, optimizer state and progress."""
        work = self.args.work
        mx.save_safetensors(str(work / "weights.safetensors"), parameters(self.model))
        state = {k: v for k, v in tree_flatten(self.optimizer.state) if isinstance(v, mx.array)}
        mx.save_safetensors(str(work / "optimizer.safetensors"), state)
        (work / "progress.json").write_text(json.dumps(vars(self.progress)))

    def restore(self) -> None:
        """Continue from the checkpoint, if there is one."""
        work = self.args.work
        if not (work / "progress.json").exists():
            return
        self.model.load_weights(str(work / "weights.safetensors"))
        self.optimizer.init(self.model.trainable_parameters())
        saved = mx.load(str(work / "optimizer.safetensors"))
        state = [(k, saved.get(k, v)) for k, v in tree_flatten(self.optimizer.state)]
        self.optimizer.state = tree_unflatten(state)
        vars(self.progress).update(json.loads((work / "progress.json").read_text()))

    def finish(self, each: int) -> None:
        """Evaluate on so many items a skill, checkpoint and export."""
        scores = evaluate(self.model, held_out(self.encoder, self.args.seed, each))
        print(f"held out: {report(scores)}", flush=True)
        self.save()
        export(self, scores)


def parameters(model: Model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(run: Run, scores: Scores) -> None:
    """Everything that mlx_lm.load and transformers need."""
    out, tokenizer = run.args.out, run.encoder.tokenizer
    out.mkdir(parents=True, exist_ok=True)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    ends = {"eos_token_id": eos, "pad_token_id": ids["<|endoftext|>"]}
    written = out / "model.safetensors.tmp"
    with written.open("wb") as file:
        mx.save_safetensors(file, parameters(run.model), {"format": "mlx"})
    written.replace(out / "model.safetensors")
    write_json(out / "config.json", {**CONFIG, "vocab_size": tokenizer.get_vocab_size(), **ends})
    write_json(out / "generation_config.json", {**ends, **SAMPLING})
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    card = CARD.format(
        parameters=sum(v.size for v in parameters(run.model).values()),
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        vocab=tokenizer.get_vocab_size(),
        minutes=run.progress.seconds / 60,
        steps=run.progress.step,
        tokens=run.progress.tokens / 1e6,
        accuracy=", ".join(f"{skill} {scores[skill][0]:.0%}" for skill in CLOSED),
    )
    (out / "MODEL.md").write_text(card, encoding="utf-8")


def load_tokenizer(work: Path, seed: int) -> Tokenizer:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(seed, CONFIG["vocab_size"]).save(str(path))
    return Tokenizer.from_file(str(path))


def train(args: argparse.Namespace) -> None:
    """The run: train to the time or step limit, with evaluation and export on the way."""
    encoder, progress = Encoder(load_tokenizer(args.work, args.seed)), Progress()
    run = Run(args, new_model(args.seed, CONFIG), new_optimizer(), encoder, progress)
    run.restore()
    gradient = nn.value_and_grad(run.model, loss_of)
    losses: list[float] = []
    began, exported = time.monotonic() - progress.seconds, progress.seconds
    for batch in stream(encoder, args.seed, args.tokens, progress):
        progress.seconds = time.monotonic() - began
        limit, spent = (
            (args.steps, progress.step) if args.steps else (60 * args.minutes, progress.seconds)
        )
        progress.fraction = spent / limit
        if progress.fraction >= 1.0:
            break
        set_rates(run.optimizer, args, progress)
        loss, grads = gradient(run.model, batch)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        run.optimizer.update(run.model, grads)
        mx.eval(run.model.parameters(), run.optimizer.state, loss)
        losses = [*losses[-24:], loss.item()]
        progress.step += 1
        progress.tokens += batch.tokens.size
        if progress.step % 25 == 0:
            speed, mean = progress.tokens / progress.seconds, sum(losses) / len(losses)
            print(
                f"{progress.step} {progress.seconds:.0f}s {speed:.0f} tok/s loss {mean:.3f}",
                flush=True,
            )
        if progress.seconds - exported > 60 * args.every:
            exported = progress.seconds
            run.finish(each=32)
    run.finish(each=128)


def conversation(ask: str, tools: list[data.Tool] | None = None, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": ask}], "tools": tools, **more}


def showcase() -> list[dict[str, Any]]:
    """Conversations to look at: a few of each skill, with and without thinking."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {
        "name": "get_weather",
        "description": "Get the current weather",
        "parameters": schema,
    }
    tools = [{"type": "function", "function": function}]
    ask = conversation("What is the weather in Paris?", tools)
    called = {
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
    }
    result = '{"temperature": 21, "condition": "sunny"}'
    answered = [
        *ask["messages"],
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "content": result},
    ]
    shown = [conversation(text) for text in SHOWN]
    shown += [ask, {"messages": answered, "tools": tools}, conversation("Hello!", tools)]
    thinking = [{**item, "enable_thinking": True} for item in (shown[0], shown[6], shown[10], ask)]
    return shown + thinking


def show(args: argparse.Namespace) -> None:
    """The held-out accuracy of the exported model, and its greedy answers to the showcase."""
    model, tokenizer = mlx_lm.load(str(args.out))
    encoder = Encoder(Tokenizer.from_file(str(args.out / "tokenizer.json")))
    print(f"held out: {report(evaluate(model, held_out(encoder, args.seed, 128)))}")
    for item in showcase():
        kwargs = {"enable_thinking": False, **item}
        messages = kwargs.pop("messages")
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs)
        answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=300)
        thinks = " (thinking)" if kwargs["enable_thinking"] else ""
        print(f"\n> {messages[-1]['content']}{thinks}\n{answer}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="where the model is exported")
    add("--work", type=Path, default=Path("build/demo"), help="checkpoints, for resuming")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=64.0, help="length of the run")
    add("--steps", type=int, default=0, help="length of the run in steps, instead of minutes")
    add("--tokens", type=int, default=2048, help="tokens of a batch")
    add("--every", type=float, default=8.0, help="minutes between checkpoints")
    add("--muon-rate", type=float, default=0.02)
    add("--adam-rate", type=float, default=3e-3)
    add("--evaluate", action="store_true", help="show the model in --out instead of training one")
    args = parser.parse_args()
    (show if args.evaluate else train)(args)


if __name__ == "__main__":
    main()
