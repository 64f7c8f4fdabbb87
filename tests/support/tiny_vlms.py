"""Four tiny random vision-language checkpoints: `python tests/tiny_vlms.py OUT [NAME...]`.

It decides what the tests of pictures run on: one family for each thing that pictures make harder
than text. `qwen3_vl` has three-part rotary positions and adds features of the picture to the first
layers (deepstack), `qwen3_5` has recurrent layers among those of attention, `gemma4` attends both
ways inside a picture, embeds tokens for each layer, shares KV and has sliding windows, `smolvlm`
cuts a picture into tiles. Each directory is complete: mlx-vlm loads it without remote code, and
mlx-lm reads the text model out of it where it knows the family (all but smolvlm).

Invariants (tested): the bytes are the same each time, what is generated depends on the picture, and
no special token is ever the most probable one, so that an answer runs to its limit. Nothing
is ever downloaded, and no weight means anything.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]
Ids = dict[str, int]

NUM_WORDS = 320  # of the byte-level vocabulary, before the special tokens
CORPUS = (
    "What is in the picture? Describe this image. Which colour and which shape? A red circle.",
    "The first picture shows a blue square; the second one a green triangle. Hello, how are you?",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9 äöüß 日本語 🙂",
)

# What each family's own template does with content, in short: a string or a list of parts, and a
# placeholder for each picture, which the processor multiplies.
CHATML = """\
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set pictures.count = pictures.count + 1 -%}
{%- if add_vision_id %}{{ 'Picture ' ~ pictures.count ~ ': ' }}{% endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
TURNS = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{%- if message.content is string -%}{{- message.content | trim -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{- part.text | trim -}}
{%- elif part.type == 'image' -%}{{- '<|image|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""
# As the family's own, it renders nothing of content that is a string.
UTTERANCES = """\
<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:
{%- if message.content[0].type != 'image' %} {% endif %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}
{%- endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


@dataclass(frozen=True)
class Family:
    """What makes a checkpoint of one family.

    `config` takes the special tokens' ids and the size of the vocabulary, `scales` multiplies the
    spread of the weights whose names end so, `named` are the tokenizer's settings that name a
    special token, `files` are further files by name, and `adds_bos` is whether the tokenizer puts
    its first token before any text, also before one where the template has put it already.
    """

    specials: tuple[str, ...]
    eos: tuple[str, ...]
    pad: str
    template: str
    config: Callable[[Ids, int], Json]
    files: dict[str, Json]
    named: dict[str, str]
    scales: dict[str, float]
    adds_bos: bool = False


QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# 16 to 64 tokens a picture: one token is 32 x 32 pixels.
QWEN_FILES = {
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 128 * 128, "longest_edge": 256 * 256},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
}


def _qwen_config(ids: Ids, family: str, text: Json, vision: Json) -> Json:
    """What the Qwen families have in common."""
    tower = {
        "depth": 2,
        "hidden_size": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 64,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
    }
    return {
        "model_type": family,
        "text_config": text,
        "vision_config": tower | vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _qwen3_vl(ids: Ids, vocab_size: int) -> Json:
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    vision = {"model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 1]}
    config = _qwen_config(ids, "qwen3_vl", text, vision)
    return config | {"architectures": ["Qwen3VLForConditionalGeneration"]}


def _qwen3_5(ids: Ids, vocab_size: int) -> Json:
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": 64,
        "num_hidden_layers": 4,  # a recurrent one, one of attention, and so on
        "full_attention_interval": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 32,  # the kernels want a multiple of 32
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    vision = {"model_type": "qwen3_5", "deepstack_visual_indexes": []}
    config = _qwen_config(ids, "qwen3_5", text, vision)
    return config | {"architectures": ["Qwen3_5ForConditionalGeneration"]}


def _gemma4(ids: Ids, vocab_size: int) -> Json:
    text = {
        "model_type": "gemma4_text",
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "sliding_window": 24,  # longer than a picture, shorter than a prompt
        "intermediate_size": 96,
        "use_double_wide_mlp": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": vocab_size,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
        "default_output_length": 16,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": vision,
        "audio_config": None,
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "pad_token_id": ids["<pad>"],
        "image_token_id": ids["<|image|>"],
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "video_token_id": ids["<|video|>"],
        "audio_token_id": ids["<|audio|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_id": ids["<audio|>"],
        "vision_soft_tokens_per_image": 16,
        "tie_word_embeddings": True,
    }


def _smolvlm(ids: Ids, vocab_size: int) -> Json:
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "smolvlm_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 16,
        "image_size": 64,
    }
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids["<image>"],
        "pad_token_id": ids["<|endoftext|>"],
        "scale_factor": 2,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
    }


FAMILIES = {
    "qwen3_vl": Family(
        specials=QWEN_SPECIALS,
        eos=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        template=CHATML,
        config=_qwen3_vl,
        files=QWEN_FILES,
        named={},
        scales={},
    ),
    "qwen3_5": Family(
        specials=QWEN_SPECIALS,
        eos=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        template=CHATML,
        config=_qwen3_5,
        files=QWEN_FILES,
        named={},
        scales={"q_norm.weight": 1.5, "k_norm.weight": 1.5},  # sharp enough to see positions
    ),
    "gemma4": Family(
        specials=(
            "<pad>",
            "<eos>",
            "<bos>",
            "<|turn>",
            "<turn|>",
            "<|image>",
            "<|image|>",
            "<image|>",
            "<|audio>",
            "<|audio|>",
            "<audio|>",
            "<|video|>",
        ),
        eos=("<turn|>", "<eos>"),
        pad="<pad>",
        template=TURNS,
        config=_gemma4,
        files={
            # 16 tokens a picture at most: a token is 16 x 16 pixels, and a picture is scaled
            # (up, too) to be about 64 x 64.
            "processor_config.json": {
                "processor_class": "Gemma4Processor",
                "image_seq_length": 16,
                "image_processor": {
                    "image_processor_type": "Gemma4ImageProcessor",
                    "patch_size": 8,
                    "pooling_kernel_size": 2,
                    "max_soft_tokens": 16,
                    "do_normalize": False,
                },
            }
        },
        named={
            "bos_token": "<bos>",
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        # The embeddings are the output's too: were they large, each token would repeat itself.
        scales={"embed_tokens.weight": 0.1, "language_model.model.norm.weight": 4.0},
        adds_bos=True,
    ),
    "smolvlm": Family(
        specials=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)),
        ),
        eos=("<end_of_utterance>", "<|im_end|>"),
        pad="<|endoftext|>",
        template=UTTERANCES,
        config=_smolvlm,
        files={
            # Scaled to 128 pixels (the longer edge), cut into tiles of 64: 4 tokens each.
            "preprocessor_config.json": {
                "image_processor_type": "SmolVLMImageProcessor",
                "processor_class": "SmolVLMProcessor",
                "do_image_splitting": True,
                "size": {"longest_edge": 128},
                "max_image_size": {"longest_edge": 64},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
            "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        },
        named={"bos_token": "<|im_start|>"},
        scales={},
    ),
}
NAMES = tuple(FAMILIES)


def save(path: Path, name: str) -> None:
    """Write the checkpoint of a family, one of `NAMES`, into a directory."""
    family = FAMILIES[name]
    path.mkdir(parents=True, exist_ok=True)
    ids, vocab_size = _save_tokenizer(path, family)
    config = family.config(ids, vocab_size)
    _write(path / "config.json", config | {"torch_dtype": "float32"})
    for file, value in family.files.items():
        _write(path / file, value)
    _write(path / "chat_template.json", {"chat_template": family.template})
    eos = [ids[text] for text in family.eos]
    _write(path / "generation_config.json", {"eos_token_id": eos, "pad_token_id": ids[family.pad]})
    _save_weights(path, name, config, range(NUM_WORDS, vocab_size), family.scales)


def _write(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_tokenizer(path: Path, family: Family) -> tuple[Ids, int]:
    """Train and save a byte-level BPE tokenizer; the special tokens' ids and its size."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_WORDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == NUM_WORDS
    specials = [AddedToken(text, special=True, normalized=False) for text in family.specials]
    tokenizer.add_special_tokens(specials)
    if family.adds_bos:
        bos = family.named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    settings: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos[0],
        "pad_token": family.pad,
        "chat_template": family.template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    _write(path / "tokenizer_config.json", settings | family.named)
    ids = {text: tokenizer.token_to_id(text) for text in family.specials}
    return ids, tokenizer.get_vocab_size()


def _save_weights(
    path: Path, name: str, config: Json, specials: range, scales: dict[str, float]
) -> None:
    """Draw all weights, by their names' order, with numpy: its draws are the same everywhere."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(len(name))
    weights: dict[str, np.ndarray] = {}
    shapes = _shapes(name, config)
    outputs = [key for key in shapes if key.endswith("lm_head.weight")]
    (output,) = outputs or [key for key in shapes if key.endswith("embed_tokens.weight")]
    for key, shape in shapes.items():
        values = _draw(rng, key, shape)
        factor = next((scale for end, scale in scales.items() if key.endswith(end)), 1.0)
        if key == output:
            values[specials.start : specials.stop] *= 0.05  # never the most probable ones
        weights[key] = (values * factor).astype(np.float32)
    save_file(weights, path / "model.safetensors", {"format": "mlx"})


def _shapes(name: str, config: Json) -> dict[str, tuple[int, ...]]:
    """The shapes of mlx-vlm's parameters by name, in the names' order."""
    import importlib

    from mlx.utils import tree_flatten

    family = importlib.import_module(f"mlx_vlm.models.{name}")
    settings = family.ModelConfig.from_dict(config)
    settings.text_config = family.TextConfig.from_dict(config["text_config"])
    settings.vision_config = family.VisionConfig.from_dict(config["vision_config"])
    parameters = tree_flatten(family.Model(settings).parameters())
    return dict(sorted((key, value.shape) for key, value in parameters))


def _draw(rng: np.random.Generator, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of about the spread that keeps activations near 1."""
    values = rng.standard_normal(shape)
    if key.endswith(("A_log", "dt_bias")):  # a decay of the state by a few per cent a token
        return values * 0.5 - 2.0
    if key.endswith(("layer_scalar", "norm.weight")) or "norm" in key.split(".")[-2]:
        return values * 0.1 + (0.0 if key.endswith("bias") else 1.0)
    if key.endswith("bias"):
        return values * 0.1
    if "embed" in key.split(".")[-2] and len(shape) == 2:
        return values
    return values / np.sqrt(np.prod(shape[1:]))


def main() -> None:
    out, *names = sys.argv[1:]
    for name in names or NAMES:
        save(Path(out) / name, name)


if __name__ == "__main__":
    main()
