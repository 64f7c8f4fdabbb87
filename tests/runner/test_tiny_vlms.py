"""Tests of the tiny vision-language checkpoints: that they load, and that pictures matter to them.

They hold for the checkpoints what the tests of the server take for granted: every field that a
family adds to the embeddings changes what is generated, so that dropping one cannot go unseen.
"""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_vlm")
pytest.importorskip("PIL")

import mlx.core as mx
import mlx_lm
import mlx_vlm
import tiny_vlms
from mlx_lm.generate import generate_step as generate_text_step
from mlx_vlm.generate import generate_step
from pictures import COLOURS, SHAPES, draw
from pictures import chequered as picture
from PIL import Image

# Of mlx-vlm's audio front end, which gemma4 makes whether or not there is any audio.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter")

NUM_TOKENS = 12
IN_MLX_LM = ("qwen3_vl", "qwen3_5", "gemma4")

Part = str | Image.Image


def content_of(parts: Iterable[Part]) -> list[dict[str, str]]:
    """Parts of a message as a template takes them: a picture is a place for it."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in parts
    ]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as mlx-vlm loads it."""

    path: Path
    model: Any
    processor: Any

    def prompt(self, *parts: Part) -> dict[str, Any]:
        """The processor's inputs for a chat of one message."""
        messages = [{"role": "user", "content": content_of(parts)}]
        text = self.processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        pictures = [part for part in parts if not isinstance(part, str)]
        inputs = self.processor(text=[text], images=pictures or None, add_special_tokens=False)
        return {name: value for name, value in inputs.items() if value is not None}

    def answer(self, *parts: Part) -> list[int]:
        """The most probable tokens after a chat of one message."""
        inputs = self.prompt(*parts)
        ids, mask = mx.array(inputs.pop("input_ids")), inputs.pop("attention_mask")
        pixels = inputs.pop("pixel_values", None)
        steps = generate_step(
            ids, self.model, pixels, mask, max_tokens=NUM_TOKENS, temperature=0.0, **inputs
        )
        return [int(token) for token, _ in steps]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    out = tmp_path_factory.mktemp("vlms")
    loaded = {}
    for name in tiny_vlms.NAMES:
        tiny_vlms.save(out / name, name)
        model, processor = mlx_vlm.load(str(out / name), trust_remote_code=False)
        loaded[name] = Loaded(out / name, model, processor)
    return loaded


@pytest.fixture(params=tiny_vlms.NAMES)
def loaded(request: pytest.FixtureRequest, checkpoints: dict[str, Loaded]) -> Loaded:
    return checkpoints[request.param]


def test_a_picture_is_answered_to_the_limit_with_ordinary_tokens(loaded: Loaded) -> None:
    answer = loaded.answer(picture(1), "What is in the picture?")
    assert len(answer) == NUM_TOKENS
    assert all(token < tiny_vlms.NUM_WORDS for token in answer)


def test_each_picture_has_an_answer_of_its_own(loaded: Loaded) -> None:
    answers = {tuple(loaded.answer(picture(seed), "What is this?")) for seed in range(4)}
    assert len(answers) == 4


def test_the_order_of_two_pictures_matters(loaded: Loaded) -> None:
    one, two = picture(1), picture(2)
    assert loaded.answer(one, two, "Compare.") != loaded.answer(two, one, "Compare.")


def test_a_picture_takes_as_many_placeholders_as_it_has_features(loaded: Loaded) -> None:
    for width, height in ((96, 80), (300, 90), (31, 64)):
        inputs = loaded.prompt(picture(1, width, height), "What is this?")
        num_placeholders = (inputs["input_ids"] == loaded.model.config.image_token_id).sum()
        assert num_placeholders > 1
        assert loaded.answer(picture(1, width, height), "What is this?")  # it would raise


@pytest.mark.parametrize("name", IN_MLX_LM)
def test_mlx_lm_reads_the_same_text_model(name: str, checkpoints: dict[str, Loaded]) -> None:
    model, tokenizer = mlx_lm.load(str(checkpoints[name].path))
    messages = [{"role": "user", "content": "Hello, how are you?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    steps = generate_text_step(mx.array(ids), model, max_tokens=NUM_TOKENS)
    answer = [int(token) for token, _ in steps]
    assert answer == checkpoints[name].answer("Hello, how are you?")


def test_mlx_lm_has_no_smolvlm(checkpoints: dict[str, Loaded]) -> None:
    with pytest.raises(ValueError, match="smolvlm not supported"):
        mlx_lm.load(str(checkpoints["smolvlm"].path))


def last_logits(loaded: Loaded, leave_out: str | None = None) -> np.ndarray:
    """The logits after a prompt with a picture, without one of the fields of that picture."""
    inputs = loaded.prompt(picture(1), "What is in the picture?")
    ids, model = inputs.pop("input_ids"), loaded.model
    pixels, mask = inputs.pop("pixel_values"), inputs.pop("attention_mask")
    fields = model.get_input_embeddings(ids, pixels, mask=mask, **inputs).to_dict()
    fields |= {name: inputs[name] for name in inputs if name.endswith("type_ids")}
    if leave_out is not None:
        assert fields.pop(leave_out) is not None
    for state in ("_position_ids", "_rope_deltas"):  # what the family remembers of the last prompt
        if hasattr(model.language_model, state):
            setattr(model.language_model, state, None)
    return np.array(model.language_model(ids, **fields).logits[0, -1])


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("qwen3_vl", "deepstack_visual_embeds"),
        ("qwen3_vl", "position_ids"),
        ("qwen3_5", "position_ids"),
        ("gemma4", "mm_token_type_ids"),
    ],
)
def test_a_field_that_is_left_out_changes_the_answer(
    name: str, field: str, checkpoints: dict[str, Loaded]
) -> None:
    whole = last_logits(checkpoints[name])
    without = last_logits(checkpoints[name], leave_out=field)
    np.testing.assert_array_equal(whole, last_logits(checkpoints[name]))
    assert np.abs(whole - without).max() > 0.1


def test_the_tokenizer_of_gemma4_doubles_the_first_token_of_the_template(
    checkpoints: dict[str, Loaded],
) -> None:
    """As the family's own do: encoding a rendered chat must turn it off."""
    tokenizer = checkpoints["gemma4"].processor.tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer.encode(text)[:2] == [tokenizer.bos_token_id] * 2


def test_the_template_of_smolvlm_renders_no_string(checkpoints: dict[str, Loaded]) -> None:
    """As the family's own: content must be rendered as parts."""
    tokenizer = checkpoints["smolvlm"].processor.tokenizer
    parts = [{"type": "text", "text": "Hello"}]
    render = {
        kind: tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for kind, content in (("string", "Hello"), ("parts", parts))
    }
    assert "Hello" in render["parts"]
    assert "Hello" not in render["string"]


def test_a_checkpoint_has_the_same_bytes_in_another_process(
    tmp_path: Path, checkpoints: dict[str, Loaded]
) -> None:
    subprocess.run([sys.executable, tiny_vlms.__file__, str(tmp_path)], check=True)
    for name, loaded in checkpoints.items():
        files = sorted(path.name for path in loaded.path.iterdir())
        assert files == sorted(path.name for path in (tmp_path / name).iterdir())
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (loaded.path / file).read_bytes()


# --- the trained one --------------------------------------------------------------------------

DEMO = Path(__file__).parents[1] / "support" / "vlm_demo"
NUM_DEMO_BYTES = 1_500_000
EACH = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return mlx_vlm.load(str(DEMO), trust_remote_code=False)


def say(demo: tuple[Any, Any], *turns: Part | tuple[Part, ...]) -> str:
    """The answer to the last turn of a chat whose turns are the user's and the assistant's."""
    messages, pictures = [], []
    for number, turn in enumerate(turns):
        parts = turn if isinstance(turn, tuple) else (turn,)
        pictures += [part for part in parts if not isinstance(part, str)]
        role = ("user", "assistant")[number % 2]
        messages.append({"role": role, "content": content_of(parts)})
    model, processor = demo
    prompt = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    result = mlx_vlm.generate(
        model, processor, prompt, image=pictures or None, max_tokens=32, temperature=0.0
    )
    return str(result.text)


@pytest.mark.parametrize(("colour", "shape"), EACH)
def test_the_trained_model_names_colour_and_shape(
    colour: str, shape: str, demo: tuple[Any, Any]
) -> None:
    picture = draw(colour, shape)
    assert say(demo, (picture, "What is in the picture?")) == f"A {colour} {shape}."
    assert say(demo, ("Which colour and which shape?", picture)) == f"A {colour} {shape}."


def test_the_trained_model_reads_small_and_wide_pictures_on_any_light_ground(
    demo: tuple[Any, Any],
) -> None:
    small = draw("blue", "triangle", (64, 64), (4, 20, 40, 56), "lightyellow")
    wide = draw("red", "square", (128, 70), (70, 10, 110, 50), "lightgrey")
    assert say(demo, (small, "What do you see?")) == "A blue triangle."
    assert say(demo, (wide, "Describe this image.")) == "A red square."


def test_the_trained_model_distinguishes_two_pictures(demo: tuple[Any, Any]) -> None:
    for first, second in zip(EACH, EACH[5:] + EACH[:5], strict=True):
        pictures = draw(*first), draw(*second)
        both = say(demo, (*pictures, "What is in the pictures?"))
        assert both == f"First: a {' '.join(first)}. Second: a {' '.join(second)}."
        one = say(demo, (*pictures, "What is in the second picture?"))
        assert one == f"A {' '.join(second)}."


def test_the_trained_model_answers_about_the_picture_of_an_earlier_turn(
    demo: tuple[Any, Any],
) -> None:
    asked = draw("yellow", "circle"), "What colour is it?"
    assert say(demo, asked) == "Yellow."
    assert say(demo, asked, "Yellow.", "And the shape?") == "A circle."
    again = draw("green", "square"), "And this one?"
    assert say(demo, asked, "Yellow.", again) == "A green square."


def test_the_trained_model_answers_that_there_is_no_picture(demo: tuple[Any, Any]) -> None:
    assert say(demo, "What is in the picture?") == "There is no picture."


def test_the_trained_model_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= NUM_DEMO_BYTES
