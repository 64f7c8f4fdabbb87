"""Loading a model: what makes one unusable, its settings and adapters.

The models are tiny random checkpoints, and everything that can be wrong with a checkpoint must end
in a LoadError that names the remedy.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from checkpoints import IM_END, complaint, edit, loaded, save_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.models.interface import LoadError
from mlxlite.models.load import LoadedModel, load

# --- what is no model -------------------------------------------------------------------------


def spoil_nothing_but(*names: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return spoil


def only_a_gguf(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / "model.gguf").write_bytes(b"GGUF")


def setting(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        edit(path / name, **changes)

    return spoil


def content(name: str, body: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).write_bytes(body)

    return spoil


def broken_merges(path: Path) -> None:
    """What the Rust tokenizers refuse with a bare Exception."""
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["no", "such"]]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (spoil_nothing_but("config.json"), r"no config\.json; give .*mlx_lm\.convert"),
    "only a gguf": (only_a_gguf, r"no config\.json \(GGUF files are not MLX models\); give "),
    "no model_type": (setting("config.json", model_type=None), "no model_type; give"),
    "odd model_type": (setting("config.json", model_type=["qwen3"]), "no model_type; give"),
    "no weights": (spoil_nothing_but("model.safetensors"), r"no model\*\.safetensors; give"),
    "no tokenizer": (spoil_nothing_but("tokenizer.json"), "no tokenizer .*; give"),
    "remote code": (setting("config.json", model_file="evil.py"), "never done: choose"),
    "unknown architecture": (
        setting("config.json", model_type="nonesuch"),
        r"nonesuch not supported; check .* mlx-lm \d",
    ),
    "no architecture at all": (setting("config.json", model_type="cache"), "check .* mlx-lm"),
    "a setting missing": (setting("config.json", hidden_size=None), "hidden_size.*; check"),
    "a setting absurd": (setting("config.json", num_attention_heads=0), "; check"),
    "config not JSON": (content("config.json", b"{"), r"config\.json cannot be read .* repair"),
    "config not UTF-8": (content("config.json", b'"\xff"'), r"config\.json cannot be read"),
    "config a list": (content("config.json", b"[]"), r"config\.json does not hold a JSON object"),
    "generation config not JSON": (
        content("generation_config.json", b"{"),
        r"generation_config\.json cannot be read .* repair",
    ),
    "generation config a list": (
        content("generation_config.json", b"[]"),
        r"generation_config\.json does not hold a JSON object",
    ),
    "weights cut off": (cut_weights, "corrupt file.*; check that the download is complete"),
    "weights empty": (content("model.safetensors", b""), "check that the download is complete"),
    "weights not safetensors": (content("model.safetensors", b"\xff" * 99), "check that"),
    "weights missing": (setting("config.json", num_hidden_layers=3), r"Missing 11 .*layers\.2\."),
    "weights superfluous": (setting("config.json", num_hidden_layers=1), r"not in model.*; check"),
    "weights of another shape": (setting("config.json", intermediate_size=64), "shape.*; check"),
    "tokenizer not JSON": (content("tokenizer.json", b"{"), r"tokenizer\.json.*; check"),
    "tokenizer of no kind": (content("tokenizer.json", b"{}"), "; check"),
    "tokenizer inconsistent": (broken_merges, "out of vocabulary.*; check"),
    "tokenizer settings not JSON": (content("tokenizer_config.json", b"{"), "; check"),
}


@pytest.mark.parametrize(("spoil", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_model_is_refused_with_what_to_do(
    copy: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(copy)
    text = complaint(copy)
    assert str(copy) in text
    assert re.search(words, text), text


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[malloc] Unable to allocate 9 bytes.")]
)
def test_the_error_for_too_little_memory_has_the_phrase_that_the_app_matches(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_model(path: Path) -> None:
        raise error

    monkeypatch.setattr("mlxlite.models.load.load_model", load_model)
    assert "insufficient memory" in complaint(checkpoint)


def test_code_in_a_checkpoint_is_not_run_and_consent_is_not_prompted_for(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str = "") -> str:
        raise AssertionError(f"transformers asks: {question}")

    monkeypatch.setattr("builtins.input", ask)
    (copy / "code.py").write_text("raise SystemExit('this is never run')")
    (copy / "configuration.py").write_text("raise SystemExit('this is never run')")
    auto = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "configuration.Config"}
    edit(copy / "config.json", auto_map=auto)
    edit(copy / "tokenizer_config.json", auto_map=auto, tokenizer_class="Tokenizer")
    with contextlib.suppress(LoadError):  # to refuse it and to load without it are both right
        loaded(copy)


# --- what a model reports of itself -----------------------------------------------------------


def save_llama(path: Path, **changes: Any) -> Path:
    """A random llama of 1 layer, whose configuration need not name a context size."""
    path.mkdir()
    settings = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": save_tokenizer(path),
    } | changes
    edit(path / "config.json", **settings)
    network = llama.Model(llama.ModelArgs.from_dict(settings))
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def test_the_context_is_as_long_as_the_model_was_made_for(model: LoadedModel) -> None:
    assert model.context_size == 512


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"max_position_embeddings": 777}, 777),
        ({"n_ctx": 333}, 333),
        ({"text_config": {"max_position_embeddings": 555}}, 555),
        ({"max_position_embeddings": 777, "text_config": {"n_ctx": 5}}, 777),
        ({"max_position_embeddings": -1, "text_config": {"max_seq_len": 444}}, 444),
        ({"n_positions": "many", "text_config": ["n_ctx"]}, 32_768),
        ({"text_config": "n_ctx"}, 32_768),
        ({}, 32_768),
    ],
    ids=repr,
)
def test_the_context_size_is_found_wherever_it_is_written(
    tmp_path: Path, settings: dict[str, Any], size: int
) -> None:
    assert loaded(save_llama(tmp_path / "llama", **settings)).context_size == size


def test_the_operator_may_shorten_the_context(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded(checkpoint, ctx_size=100).context_size == 100
    assert caplog.messages == []


def test_the_operator_may_stretch_the_context_and_is_warned(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded(checkpoint, ctx_size=4096).context_size == 4096
    assert caplog.messages == ["--ctx-size 4096 is more than the model was made for (512)"]


@pytest.mark.parametrize(
    ("generation", "config", "eos"),
    [
        (None, None, {IM_END}),
        (7, None, {7, IM_END}),
        ([7, 8], None, {7, 8, IM_END}),
        (None, 9, {9, IM_END}),
        (7, 9, {7, IM_END}),  # the publisher's later word
        (0, 9, {0, IM_END}),
    ],
)
def test_an_answer_ends_at_any_end_token_of_configuration_and_tokenizer(
    copy: Path, generation: Any, config: Any, eos: set[int]
) -> None:
    edit(copy / "generation_config.json", eos_token_id=generation)
    edit(copy / "config.json", eos_token_id=config)
    assert loaded(copy).eos_tokens == eos


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        ({}, SamplingParams()),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "do_sample": True},
            SamplingParams(0.6, 0.95, 20, 0.05),
        ),
        ({"temperature": 0.6, "do_sample": False}, SamplingParams(0.0)),
        ({"temperature": 0}, SamplingParams(0.0)),
        ({"temperature": None, "top_k": None}, SamplingParams()),
    ],
    ids=repr,
)
def test_the_publishers_sampling_is_the_default(
    copy: Path, settings: dict[str, Any], defaults: SamplingParams, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "generation_config.json", **settings)
    assert loaded(copy).defaults == defaults
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 101),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", "0.7"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2**31),
        ("min_p", 2),
        ("min_p", [0.1]),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_a_publishers_setting_that_is_out_of_range_is_ignored_with_one_warning(
    copy: Path, name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "generation_config.json", **{name: value})
    assert loaded(copy).defaults == SamplingParams()
    assert len(caplog.messages) == 1
    assert name in caplog.messages[0]
    assert len(caplog.messages[0]) < 200


# --- adapters ---------------------------------------------------------------------------------


def save_adapter(checkpoint: Path, path: Path, seed: int = 1, scale: float = 20.0) -> Path:
    """A LoRA of rank 4 over every layer, as `mlx_lm.lora` writes it, but with random weights."""
    lora = {"rank": 4, "scale": scale, "dropout": 0.5}
    network, _ = load_model(checkpoint)
    network.freeze()
    linear_to_lora_layers(network, 2, lora)
    mx.random.seed(seed)
    weights = {
        name: mx.random.normal(weight.shape)
        for name, weight in tree_flatten(network.trainable_parameters())
    }
    assert weights
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    edit(path / "adapter_config.json", fine_tune_type="lora", num_layers=2, lora_parameters=lora)
    return path


def logits(network: Any) -> list[list[float]]:
    """What the network computes for each of some tokens."""
    values: Any = network(mx.array([list(range(8))]))[0].tolist()
    return list(values)


def adapted(checkpoint: Path, adapter: Path | None) -> tuple[Any, LoadedModel]:
    return load(Config(model=str(checkpoint), adapter_path=adapter and str(adapter)))


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(checkpoint, tmp_path_factory.mktemp("adapters") / "lora")


def test_an_adapter_changes_the_answer_and_the_fingerprint(
    checkpoint: Path, model: LoadedModel, adapter: Path
) -> None:
    plain, _ = adapted(checkpoint, None)
    network, changed = adapted(checkpoint, adapter)
    assert logits(network) != logits(plain)
    assert changed.fingerprint != model.fingerprint
    assert changed.id == model.id
    assert logits(network) == logits(network), "its dropout is for training"
    network_again, again = adapted(checkpoint, adapter)
    assert again.fingerprint == changed.fingerprint
    assert logits(network_again) == logits(network)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"scale": 0.01}])
def test_another_adapter_has_another_fingerprint(
    checkpoint: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = save_adapter(checkpoint, tmp_path / "other", **changes)
    (one, model), (two, other_model) = (adapted(checkpoint, path) for path in (adapter, other))
    assert logits(one) != logits(two)
    assert model.fingerprint != other_model.fingerprint


def test_an_adapter_may_lie_in_the_home_directory(
    checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(adapter.parent))
    assert loaded(checkpoint, adapter_path=f"~/{adapter.name}").fingerprint


@pytest.mark.parametrize(
    "spoil",
    [
        shutil.rmtree,
        lambda path: (path / "adapter_config.json").unlink(),
        lambda path: (path / "adapters.safetensors").unlink(),
        lambda path: (path / "adapter_config.json").write_text("{"),
        lambda path: (path / "adapter_config.json").write_text("[]"),
        lambda path: (path / "adapter_config.json").write_text("{}"),
        lambda path: (path / "adapters.safetensors").write_bytes(b"x" * 20),
        lambda path: edit(path / "adapter_config.json", lora_parameters={"rank": 4}),
        lambda path: edit(path / "adapter_config.json", num_layers="all"),
        lambda path: mx.save_safetensors(
            str(path / "adapters.safetensors"), {"nobody.lora_a": mx.zeros((4, 4))}
        ),
        lambda path: mx.save_safetensors(
            str(path / "adapters.safetensors"),
            {
                name: mx.zeros((3, 3))
                for name in cast("dict[str, mx.array]", mx.load(str(path / "adapters.safetensors")))
            },
        ),
    ],
    ids=[
        "nothing there",
        "no configuration",
        "no weights",
        "configuration not JSON",
        "configuration not an object",
        "configuration empty",
        "weights not safetensors",
        "no scale",
        "layers not a number",
        "weights of another model",
        "weights of another shape",
    ],
)
def test_an_unusable_adapter_is_refused_by_its_flag(
    checkpoint: Path, adapter: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    path = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    spoil(path)
    assert f"--adapter-path {path}: " in complaint(checkpoint, adapter_path=str(path))
