"""Find a model's directory and read its settings; download it from the Hugging Face hub if needed.

Downloads only the files that mlx-lm reads, and never code. Needs no MLX. An unusable directory is a
LoadError that names the remedy.
"""

import json
import logging
from pathlib import Path
from typing import Any

from mlxlite.errors import reason_of
from mlxlite.models.interface import LoadError

log = logging.getLogger("mlxlite.hub")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
DEMO_PATH = Path(__file__).parents[1] / "demo"
# Everything mlx-lm reads, and nothing that would be code.
_PATTERNS = [
    *("*.json", "*.jsonl", "*.txt", "*.jinja", "*.tiktoken", "tiktoken.model", "tokenizer.model"),
    "model*.safetensors",
]


def locate(name: str | None) -> Path:
    """The directory of a model: the demo, a directory, a file inside one, or a Hugging Face id.

    Raises LoadError.
    """
    if name is None:
        return DEMO_PATH
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if path.is_file():
            return path.parent
        is_in_directory = path.parent.exists()
    except (OSError, RuntimeError) as error:  # too long, no permission, ~ of an unknown user
        raise LoadError(f"--model {name[:300]} cannot be read: {reason_of(error)}") from error
    is_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not path.suffix
    if is_hub_id or (name.count("/") == 1 and not is_in_directory):
        return _download(name)
    raise LoadError(
        f"there is no model at {name}: no such file or directory; give a model's directory, "
        "a file in it, or a Hugging Face id (owner/name)"
    )


def _download(repo: str) -> Path:
    """A snapshot from the Hugging Face hub; obeys HF_HUB_OFFLINE, and resumes broken downloads."""
    from huggingface_hub import constants, errors, snapshot_download

    log.info("looking for %s on the Hugging Face hub, if it is not in the cache", repo)
    try:
        return Path(snapshot_download(repo, allow_patterns=_PATTERNS))
    except errors.GatedRepoError:
        why = "it is gated: accept its terms on huggingface.co and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "there is no such path and no such repository (a private one needs HF_TOKEN)"
    except errors.HFValidationError:
        why = "it is neither a path that exists nor a Hugging Face id (owner/name)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = f"{reason_of(error.__cause__ or error)}: check the network"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set: unset it"
        why = f"it is not, or not all of it, in the local cache, and the hub is no help ({reason})"
    except (errors.HfHubHTTPError, _http_error(), OSError, RuntimeError, ValueError) as error:
        advice = "check HF_TOKEN if the hub says 401, else try again: complete files are kept"
        why = f"the download failed ({reason_of(error)}); {advice}"
    raise LoadError(f"cannot get the model {repo}: {why}")


def _http_error() -> type[Exception]:
    """The HTTP library's own error, which huggingface_hub raises when a connection fails."""
    from huggingface_hub import errors

    return next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def read_settings(path: Path) -> dict[str, Any]:
    """config.json, after checks whose messages are clearer than the loader's.

    Raises LoadError.
    """

    def unlike_mlx(what: str) -> LoadError:
        needs = "a directory with config.json, model*.safetensors and a tokenizer"
        return LoadError(f"{path} is not an MLX model: {what}; give {needs} (see mlx_lm.convert)")

    settings = read_json(path / "config.json")
    if settings is None:
        hint = " (GGUF files are not MLX models)" if any(path.glob("*.gguf")) else ""
        raise unlike_mlx(f"it has no config.json{hint}")
    if not isinstance(settings.get("model_type"), str):
        raise unlike_mlx("its config.json names no model_type")
    if settings.get("model_file") is not None:
        raise LoadError(
            f"{path} wants to run code of its own (model_file), which is never done: "
            "choose a model whose architecture mlx-lm has"
        )
    if not any(path.glob("model*.safetensors")):
        raise unlike_mlx("it has no model*.safetensors")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise unlike_mlx(f"it has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    return settings


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None without such a file. Raises LoadError if it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise LoadError(f"{path} cannot be read ({reason}): download or repair it") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} does not hold a JSON object: download or repair it")
    return value


def read_sidecar(path: Path) -> str | dict[str, str] | None:
    """The chat templates of a checkpoint that transformers does not find by itself, else None.

    It reads tokenizer_config.json, or instead of it chat_template.jinja and the named ones of
    additional_chat_templates/, but no chat_template.json. Raises LoadError.
    """
    if (path / "chat_template.jinja").is_file():
        return None
    given = (read_json(path / "tokenizer_config.json") or {}).get("chat_template")
    named = {file.stem: file for file in (path / "additional_chat_templates").glob("*.jinja")}
    if given and not named:
        return None
    given = given or (read_json(path / "chat_template.json") or {}).get("chat_template")
    if isinstance(given, list):
        given = {one["name"]: one["template"] for one in given}
    if not named:
        return given
    default = {"default": given} if isinstance(given, str) else given or {}
    return default | {name: file.read_text(encoding="utf-8") for name, file in named.items()}


def read_template(given: str | None) -> str | None:
    """The text of --chat-template, which is a path or the template itself (it contains braces).

    Raises LoadError.
    """
    if given is None or "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(
            f"--chat-template {given[:300]}: {reason_of(error)}; give a path or a template's text"
        ) from error
