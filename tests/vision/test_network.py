"""Rows with images and rows without, in one batch, have the tokens of mlx-vlm for each alone.

Greedy, float32, for a checkpoint of each kind that pictures make harder: positions that count rows
and columns (qwen3_vl, qwen3_5), states of the first layers (qwen3_vl), recurrent layers (qwen3_5),
attention that looks ahead inside of pictures (gemma4), and pictures in tiles (smolvlm).
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm")
pytest.importorskip("PIL")

import mlx_vlm
import tiny_vlms
from fakes import Run, drive
from mlx_vlm.generate import generate_step
from pictures import chequered as picture
from PIL import Image

from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Prompt, Sequence
from mlxlite.engine.step import Add, Command, Finish
from mlxlite.models.interface import LoadError
from mlxlite.models.load import LoadedModel, load
from mlxlite.prefix_cache.hashing import blocks_of
from mlxlite.runner.kv_cache import KVBits
from mlxlite.runner.model_runner import ModelRunner
from mlxlite.vision.images import ImageError
from mlxlite.vision.network import FEATURE_BYTES, VisionNetwork

# Of mlx-vlm's audio front end, which gemma4 makes whether or not there is any audio.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter")

BLOCK = 4
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0)
Part = str | Image.Image


@dataclass(frozen=True)
class Picture:
    pixels: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.size

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.pixels.tobytes() + repr(self.pixels.size).encode()).digest()


def messages_of(*turns: SequenceOf[Part]) -> list[dict[str, Any]]:
    """A chat, alternating user and assistant messages."""
    return [
        {
            "role": "assistant" if i % 2 else "user",
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn
            ],
        }
        for i, turn in enumerate(turns)
    ]


def pictures_of(*turns: SequenceOf[Part]) -> list[Image.Image]:
    return [part for turn in turns for part in turn if not isinstance(part, str)]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as loaded by this server and by mlx-vlm."""

    name: str
    network: Any
    model: LoadedModel
    theirs: Any
    processor: Any
    known: dict[str, list[int]] = field(default_factory=dict)

    def prompt(self, *turns: SequenceOf[Part]) -> Prompt:
        pictures = [Picture(pixels) for pixels in pictures_of(*turns)]
        prompt = self.model.render(
            messages_of(*turns), {}, is_continuation=False, pictures=pictures
        )
        return replace(
            prompt, blocks=blocks_of(prompt.cache_tokens(), 0, BLOCK, prompt.message_starts)
        )

    def expected(self, *turns: SequenceOf[Part], num: int = NUM_TOKENS) -> list[int]:
        """The tokens that mlx-vlm generates, alone."""
        pictures = [Picture(pixels).digest for pixels in pictures_of(*turns)]
        key = repr((messages_of(*turns), pictures))
        if len(self.known.get(key, ())) < num:
            self.known[key] = self._generate(*turns, num=max(num, NUM_TOKENS))
        return self.known[key][:num]

    def _generate(self, *turns: SequenceOf[Part], num: int) -> list[int]:
        text = self.processor.tokenizer.apply_chat_template(
            messages_of(*turns), tokenize=False, add_generation_prompt=True
        )
        pictures = pictures_of(*turns) or None
        inputs = self.processor(text=[text], images=pictures, add_special_tokens=False)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        ids, mask = mx.array(inputs.pop("input_ids")), inputs.pop("attention_mask")
        pixels = inputs.pop("pixel_values", None)
        steps = generate_step(
            ids, self.theirs, pixels, mask, max_tokens=num, temperature=0.0, **inputs
        )
        return [int(token) for token, _ in steps]

    def server(self, **settings: Any) -> "Server":
        return Server(self, **settings)


class Server:
    """A scheduler and a runner over one checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, *, chunk: int = 2048, max_rows: int = 4, cache: int = 1 << 30
    ) -> None:
        network = checkpoint.network
        assert isinstance(network, VisionNetwork)
        network.forget()
        network.num_encoded = 0
        self.network = network
        self.runner = ModelRunner(network)
        policy = Policy(
            max_rows,
            chunk_size=chunk,
            first_chunk_budget=chunk,
            memory=self.runner.memory,
            prefix_bytes=cache,
            block_size=BLOCK,
        )
        self.scheduler = Scheduler(policy)
        self.num_sequences = 0

    def sequence(self, prompt: Prompt, max_tokens: int = NUM_TOKENS, **more: Any) -> Sequence:
        self.num_sequences += 1
        return Sequence(self.num_sequences, prompt, GREEDY, max_tokens, **more)

    def drive(self, log: Mapping[int, SequenceOf[Command]]) -> Run:
        return drive(self.scheduler, self.runner, log)

    def ask(self, prompt: Prompt, max_tokens: int = NUM_TOKENS) -> list[int]:
        sequence = self.sequence(prompt, max_tokens)
        self.steps = (run := self.drive({0: [Add(sequence)]})).steps
        return run.tokens(sequence.id)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Checkpoint]]:
    mx.disable_compile()
    out = tmp_path_factory.mktemp("vlms")
    loaded = {}
    for name in tiny_vlms.NAMES:
        tiny_vlms.save(out / name, name)
        network, model = load(Config(model=str(out / name)))
        loaded[name] = Checkpoint(
            name, network, model, *mlx_vlm.load(str(out / name), trust_remote_code=False)
        )
    yield loaded
    mx.enable_compile()


@pytest.fixture(params=tiny_vlms.NAMES)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


ONE = [[picture(1), "What is in the picture?"]]
OTHER = [["Look at ", picture(2, 128, 64), " and say what you see."]]
TWO = [[picture(3), "and", picture(4, 64, 112), "differ in what?"]]
TEXT = [["Hello, how are you today?"]]


def test_the_answer_depends_on_the_image(checkpoint: Checkpoint):
    assert checkpoint.model.vision_unavailable_reason is None


@pytest.mark.parametrize("chunk", [5, 16, 2048])
def test_each_row_alone_has_the_tokens_of_mlx_vlm(checkpoint: Checkpoint, chunk: int):
    for turns in (ONE, OTHER, TWO, TEXT):
        server = checkpoint.server(chunk=chunk)
        assert server.ask(checkpoint.prompt(*turns)) == checkpoint.expected(*turns)


@pytest.mark.parametrize("chunk", [7, 2048])
def test_rows_with_and_without_images_in_one_batch_have_the_tokens_of_each_alone(
    checkpoint: Checkpoint, chunk: int
):
    server = checkpoint.server(chunk=chunk)
    asked = [ONE, OTHER, TWO, TEXT]
    sequences = [server.sequence(checkpoint.prompt(*turns), 40) for turns in asked]
    run = server.drive({0: [Add(sequence) for sequence in sequences]})
    assert max(len(step.rows) for step in run.steps) == 4
    for turns, sequence in zip(asked, sequences, strict=True):
        assert run.tokens(sequence.id) == checkpoint.expected(*turns, num=40)


def test_rows_that_join_and_leave_do_not_change_the_others(checkpoint: Checkpoint):
    server = checkpoint.server(chunk=9, max_rows=3)
    wanted = [ONE, TEXT, OTHER, TWO, ONE, TEXT]
    lengths = [12, 3, 9, 12, 5, 12]
    sequences = [
        server.sequence(checkpoint.prompt(*turns), length)
        for turns, length in zip(wanted, lengths, strict=True)
    ]
    log: dict[int, list[Command]] = {3 * i: [Add(s)] for i, s in enumerate(sequences)}
    log.setdefault(10, []).append(Finish(sequences[0].id, FinishReason.CANCELLED))
    run = server.drive(log)
    for turns, sequence in zip(wanted, sequences, strict=True):
        expected = checkpoint.expected(*turns, num=sequence.max_tokens)
        tokens = run.tokens(sequence.id)
        assert tokens == expected[: len(tokens)]
        if sequence is not sequences[0]:
            assert tokens == expected


# --- what is kept -----------------------------------------------------------------------------


def test_a_second_question_about_an_image_does_not_encode_it_again(checkpoint: Checkpoint):
    server = checkpoint.server()
    first = [picture(1), "What is in the picture?"]
    server.ask(checkpoint.prompt(first))
    assert server.network.num_encoded == 1
    turns = [first, ["A cat."], ["And what colour has it?"]]
    prompt = checkpoint.prompt(*turns)
    server.network.forget()
    assert server.ask(prompt) == checkpoint.expected(*turns)
    assert server.network.num_encoded == 1
    assert server.scheduler.prefix.stats.num_hit > prompt.images[0].stop // 2
    assert not any(step.images for step in server.steps)


def test_another_image_of_the_same_size_shares_no_prefix_from_its_first_token_on(
    checkpoint: Checkpoint,
):
    server = checkpoint.server()
    for seed in (1, 2, 1):
        turns = [["Now ", picture(seed), "what is it?"]]
        prompt = checkpoint.prompt(*turns)
        before = server.scheduler.prefix.stats.num_hit
        assert server.ask(prompt) == checkpoint.expected(*turns)
        num_hit = server.scheduler.prefix.stats.num_hit - before
        if seed == 2:
            assert num_hit <= prompt.images[0].start
    assert num_hit >= prompt.images[0].stop // BLOCK * BLOCK - BLOCK
    assert server.network.num_encoded == 2


def test_an_image_after_other_text_is_not_encoded_again(checkpoint: Checkpoint):
    server = checkpoint.server()
    for words in ("One: ", "Something else altogether: "):
        turns = [[words, picture(5), "?"]]
        assert server.ask(checkpoint.prompt(*turns)) == checkpoint.expected(*turns)
    assert server.network.num_encoded == 1


@pytest.mark.parametrize("chunk", [6, 2048])
def test_an_image_is_added_to_a_conversation_with_one(checkpoint: Checkpoint, chunk: int):
    server = checkpoint.server(chunk=chunk)
    turns: list[list[Part]] = [[picture(1), "What is this?"]]
    for seed in (2, 3):
        server.ask(checkpoint.prompt(*turns))
        turns += [["A thing."], [picture(seed), "And this?"]]
        assert server.ask(checkpoint.prompt(*turns)) == checkpoint.expected(*turns)
    assert server.network.num_encoded == 3


def test_a_cached_prefix_may_end_inside_an_image(checkpoint: Checkpoint):
    turns = [["Say: ", picture(6, 128, 128), "?"]]
    prompt = checkpoint.prompt(*turns)
    image = prompt.images[0]
    num_inside = 0
    for ticks in range(2, 14, 2):
        server = checkpoint.server(chunk=4)
        sequence = server.sequence(prompt)
        end = Finish(sequence.id, FinishReason.CANCELLED)
        server.drive({0: [Add(sequence)], ticks: [end]})
        assert server.ask(prompt) == checkpoint.expected(*turns)
        num_hit = server.scheduler.prefix.stats.num_hit
        num_inside += image.start < num_hit < image.stop
    # With bidirectional attention in images, no prefix ends before the last one's end.
    assert (num_inside > 0) == (checkpoint.name != "gemma4")


# --- as any other sequence --------------------------------------------------------------------


def test_several_choices_about_one_image_cost_one_encoding_and_one_prefill(checkpoint: Checkpoint):
    server = checkpoint.server()
    turns = [["Look at ", picture(2, 128, 64), " and say " + "what you see " * 6]]
    prompt = checkpoint.prompt(*turns)
    choices = [server.sequence(prompt) for _ in range(3)]
    run = server.drive({0: [Add(sequence) for sequence in choices]})
    for sequence in choices:
        assert run.tokens(sequence.id) == checkpoint.expected(*turns)
    num_prefilled = sum(step.num_prefill_tokens for step in run.steps)
    assert num_prefilled < len(prompt.tokens) + 2 * BLOCK
    assert server.network.num_encoded == 1


@pytest.mark.parametrize("has_cache", [True, False])
def test_a_preempted_row_resumes_with_the_same_tokens(checkpoint: Checkpoint, has_cache: bool):
    for tick in (2, 4, 6, 9, 15):
        server = checkpoint.server(max_rows=1, chunk=16, cache=has_cache << 30)
        prompt = checkpoint.prompt(*ONE)
        low = server.sequence(prompt if has_cache else replace(prompt, blocks=None))
        high = server.sequence(checkpoint.prompt(*TEXT), 3, priority=-1)
        run = server.drive({0: [Add(low)], tick: [Add(high)]})
        assert run.tokens(low.id) == checkpoint.expected(*ONE)
        assert run.tokens(high.id) == checkpoint.expected(*TEXT, num=3)


def test_a_lost_prefix_is_computed_again(checkpoint: Checkpoint):
    server = checkpoint.server()
    turns = [*ONE, ["A thing."], ["And?"]]
    server.ask(checkpoint.prompt(*ONE))
    server.runner._snapshots.by_id.clear()
    server.network.forget()
    assert server.ask(checkpoint.prompt(*turns)) == checkpoint.expected(*turns)
    assert server.network.num_encoded == 2


def test_a_tower_that_fails_costs_its_own_sequence_only(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    server = checkpoint.server()
    encode = VisionNetwork._encode

    def fail(self: VisionNetwork, inputs: Any) -> Any:
        if inputs is prompts[1].images[0].inputs:
            raise RuntimeError("[malloc] Unable to allocate")
        return encode(self, inputs)

    prompts = [checkpoint.prompt(*turns) for turns in (ONE, OTHER, TEXT)]
    monkeypatch.setattr(VisionNetwork, "_encode", fail)
    sequences = [server.sequence(prompt) for prompt in prompts]
    run = server.drive({0: [Add(sequence) for sequence in sequences]})
    assert run.tokens(sequences[0].id) == checkpoint.expected(*ONE)
    assert run.tokens(sequences[2].id) == checkpoint.expected(*TEXT)
    (end,) = run.ends(sequences[1].id)
    assert end.reason is FinishReason.ERROR
    assert "Unable to allocate" in (end.error or "")


@pytest.mark.parametrize("name", ["features", "positions"])
def test_a_network_that_fails_in_an_unknown_way_costs_its_own_sequence_only(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str
):
    def fail(*_: Any) -> Any:
        raise IndexError("list index out of range")

    server = checkpoint.server()
    sequences = [server.sequence(checkpoint.prompt(*turns)) for turns in (ONE, TEXT)]
    monkeypatch.setattr(VisionNetwork, name, fail)
    run = server.drive({0: [Add(sequence) for sequence in sequences]})
    assert run.tokens(sequences[1].id) == checkpoint.expected(*TEXT)
    (end,) = run.ends(sequences[0].id)
    if name == "features" or server.network.has_positions:
        assert "IndexError" in (end.error or "")


def test_the_cached_features_are_bounded(checkpoint: Checkpoint):
    server = checkpoint.server(cache=0)
    server.network.max_bytes = 1  # only the newest
    for seed in (1, 2, 1):
        turns = [[picture(seed), "?"]]
        assert server.ask(checkpoint.prompt(*turns)) == checkpoint.expected(*turns)
    assert server.network.num_encoded == 3
    assert len(server.network._cached) == 1
    server.network.max_bytes = FEATURE_BYTES


def test_a_reset_clears_the_cached_features(checkpoint: Checkpoint):
    server = checkpoint.server()
    server.ask(checkpoint.prompt(*ONE))
    server.runner.reset()
    assert not server.network._cached


@pytest.mark.parametrize("name", ["qwen3_5", "smolvlm"])
def test_keys_and_values_may_be_quantised(name: str, checkpoints: dict[str, Checkpoint]):
    checkpoint = checkpoints[name]
    runner = ModelRunner(checkpoint.network, kv_bits=KVBits(8, 32))

    def tokens(*asked: list[list[Part]]) -> list[list[int]]:
        scheduler = Scheduler(Policy(max_rows=4, memory=runner.memory))
        sequences = [
            Sequence(i, replace(checkpoint.prompt(*turns), blocks=None), GREEDY, NUM_TOKENS)
            for i, turns in enumerate(asked)
        ]
        run = drive(scheduler, runner, {0: [Add(sequence) for sequence in sequences]})
        return [run.tokens(sequence.id) for sequence in sequences]

    assert tokens(ONE, TEXT, TWO) == [tokens(turns)[0] for turns in (ONE, TEXT, TWO)]


def test_text_embeddings_are_computed_or_refused(checkpoint: Checkpoint):
    server = checkpoint.server()
    inputs = [tuple(range(9)), tuple(range(20))]
    if checkpoint.name == "smolvlm":
        with pytest.raises(NotImplementedError):
            server.runner.embed(inputs, is_mean=True)
        return
    together = server.runner.embed(inputs, is_mean=True)
    alone = [server.runner.embed([tokens], is_mean=True)[0] for tokens in inputs]
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1.0)


# --- what is refused --------------------------------------------------------------------------


def test_a_template_that_omits_an_image_is_a_clear_error(checkpoint: Checkpoint):
    template = "{{ messages[0].content[0].type }}"
    chat_template = replace(checkpoint.model.chat_template, source=template)
    messages = messages_of([picture(1), "?"])
    with pytest.raises(ImageError, match=r"picture|image"):
        chat_template.render(messages, {}, is_continuation=False, pictures=[Picture(picture(1))])


def test_code_in_a_checkpoint_is_never_run(checkpoint: Checkpoint, tmp_path: Path):
    path = tmp_path / "hostile"
    shutil.copytree(checkpoint.model.path, path)
    (path / "evil.py").write_text("raise SystemExit('it was run')")
    settings = json.loads((path / "config.json").read_text())
    auto = {"AutoProcessor": "evil.Processor", "AutoConfig": "evil.Config"}
    (path / "config.json").write_text(json.dumps(settings | {"model_file": "evil.py"}))
    with pytest.raises(LoadError, match="model_file"):
        load(Config(model=str(path)))
    (path / "config.json").write_text(json.dumps(settings | {"auto_map": auto}))
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (path / name).exists():
            own = json.loads((path / name).read_text())
            (path / name).write_text(json.dumps(own | {"auto_map": auto}))
    assert load(Config(model=str(path)))[1].id  # with or without images, but never run


def test_without_mlx_vlm_text_is_served_and_images_have_an_error_naming_the_package(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlxlite.models.load._has_mlx_vlm", lambda: False)
    config = Config(model=str(checkpoint.model.path))
    if checkpoint.name == "smolvlm":  # mlx-lm has no such text model
        with pytest.raises(LoadError, match=r"mlxlite\[vision\]"):
            load(config)
        return
    network, model = load(config)
    assert "pip install 'mlxlite[vision]'" in (model.vision_unavailable_reason or "")
    server = Checkpoint(checkpoint.name, network, model, checkpoint.theirs, checkpoint.processor)
    scheduler, runner = Scheduler(Policy()), ModelRunner(network)
    prompt = replace(server.prompt(*TEXT), blocks=None)
    run = drive(scheduler, runner, {0: [Add(Sequence(1, prompt, GREEDY, NUM_TOKENS))]})
    assert run.tokens(1) == checkpoint.expected(*TEXT)


def test_cached_images_of_one_prompt_need_only_their_sizes(
    checkpoint: Checkpoint,
):
    @dataclass(frozen=True)
    class Undecodable:
        digest: bytes
        size: tuple[int, int]

        @property
        def pixels(self) -> Any:
            raise AssertionError("the tower must not run")

    server = checkpoint.server(cache=0)
    reader = checkpoint.model.chat_template.image_reader
    assert not isinstance(reader, str)
    for turns in (TWO, ONE):
        known = [Picture(pixels) for pixels in pictures_of(*turns)]
        first = checkpoint.prompt(*turns)
        assert all(reader.knows(picture.digest) for picture in known)
        again = checkpoint.model.render(
            messages_of(*turns, ["A thing."], ["And?"]),
            {},
            is_continuation=False,
            pictures=[Undecodable(picture.digest, picture.size) for picture in known],
        )
        places = [(image.start, image.stop, image.digest) for image in again.images]
        assert places == [(image.start, image.stop, image.digest) for image in first.images]
        expected = checkpoint.expected(*turns, ["A thing."], ["And?"])
        assert server.ask(again) == expected


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_any_order_of_events_have_the_tokens_of_each_alone(
    checkpoint: Checkpoint, seed: int
):
    chance = random.Random(seed)
    server = checkpoint.server(
        chunk=chance.choice([6, 20, 2048]),
        max_rows=chance.choice([2, 3, 5]),
        cache=chance.choice([0, 60_000, 1 << 30]),
    )
    second: list[list[Part]] = [*ONE, ["A thing."], ["And ", picture(2), "?"]]
    choices = [ONE, OTHER, TWO, TEXT, second, [["Hello, ", picture(1), "how are you today?"]]]
    asked: dict[int, list[list[Part]]] = {}
    sequences: dict[int, Sequence] = {}
    log: dict[int, list[Command]] = {}
    for _ in range(14):
        turns = chance.choice(choices)
        sequence = server.sequence(
            checkpoint.prompt(*turns), chance.randint(1, 12), priority=chance.choice([0, 0, -1])
        )
        asked[sequence.id], sequences[sequence.id] = turns, sequence
        tick = chance.randrange(40)
        log.setdefault(tick, []).append(Add(sequence))
        if chance.random() < 0.2:
            end = Finish(sequence.id, FinishReason.CANCELLED)
            log.setdefault(tick + chance.randrange(12), []).append(end)
    run = server.drive(log)
    for id, sequence in sequences.items():
        tokens = run.tokens(id)
        expected = checkpoint.expected(*asked[id])[: sequence.max_tokens]
        assert tokens == expected[: len(tokens)]
        if run.ends(id)[0].reason is FinishReason.LENGTH:
            assert tokens == expected
