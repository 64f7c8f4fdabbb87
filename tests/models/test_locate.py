"""Where a model is: a path, a file in a directory, or a repository of a local hub.

The hub is a local server under the real huggingface_hub.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import CHAT_TEMPLATE, SECRET, complaint, loaded
from fakehub import BAD_TOKEN, BUSY, GATED, Hub, Refusal

from mlxlite.models.interface import LoadError
from mlxlite.models.load import LoadedModel
from mlxlite.models.locate import DEMO_PATH, locate

# --- where a model is -------------------------------------------------------------------------


def test_without_a_name_it_is_the_demo() -> None:
    assert locate(None) == DEMO_PATH


def test_a_directory_is_a_model(checkpoint: Path) -> None:
    model = loaded(checkpoint)
    assert model.path == checkpoint
    assert model.id == "tiny-qwen3"


def test_a_file_inside_a_directory_names_the_directory(checkpoint: Path) -> None:
    model = loaded(checkpoint / "model.safetensors")
    assert model.path == checkpoint
    assert model.id == "tiny-qwen3"


def test_a_tilde_is_the_home_directory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert locate(f"~/{checkpoint.name}") == checkpoint


def test_a_relative_path_is_a_path_even_if_it_could_be_an_id(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent.parent)
    assert locate(f"{checkpoint.parent.name}/{checkpoint.name}").resolve() == checkpoint.resolve()


def test_the_operator_names_the_model(checkpoint: Path) -> None:
    assert loaded(checkpoint, model_id="my-model").id == "my-model"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/no/such/directory", "no such file or directory"),
        ("/no/such/model.safetensors", "no such file or directory"),
        ("./model", "no such file or directory"),
        ("model.safetensors", "no such file or directory"),
        ("owner/name/more", "no such file or directory"),
        ("https://huggingface.co/owner/name", "no such file or directory"),
        ("my model", "Hugging Face id (owner/name)"),
        ("-name", "Hugging Face id (owner/name)"),
        ("owner/na..me", "Hugging Face id (owner/name)"),
        ("nul\0byte", "Hugging Face id (owner/name)"),
        ("~no-such-user/model", "cannot be read"),
        ("a" * 5000, "cannot be read"),
    ],
)
def test_a_name_that_is_no_path_and_no_id_is_refused(name: str, why: str) -> None:
    with pytest.raises(LoadError) as caught:
        locate(name)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(checkpoint: Path) -> dict[str, bytes]:
    """A repository: a model, and files that must not be fetched."""
    wanted = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}
    more = {"chat_template.jinja": CHAT_TEMPLATE.encode()}
    more |= {name: name.encode() for name in ("merges.txt", "tiktoken.model")}
    names = ("model.py", "pytorch_model.bin", "model.gguf", "README.md", "x.pkl", "x.safetensors")
    return wanted | more | {name: f"{name} is not for us".encode() for name in names}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The real huggingface_hub, in this process, on an empty cache and without a network."""
    from huggingface_hub import close_session, constants

    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    path = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    point_to(nowhere, monkeypatch)
    close_session()
    yield path
    close_session()


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        point_to(hub.url, monkeypatch)
        yield hub


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def save_in_cache(cache: Path, repo: str, checkpoint: Path) -> Path:
    """Lay a checkpoint out as the hub's cache does: blobs, and links in a snapshot of a ref."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / "abc"
    for directory in (root / "refs", root / "blobs", snapshot):
        directory.mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_hugging_face_id_is_downloaded(
    hub: Hub, cache: Path, files: dict[str, bytes], model: LoadedModel
) -> None:
    hub.repos["owner/tiny-4.5"] = files
    downloaded = loaded("owner/tiny-4.5")
    assert downloaded.id == "owner/tiny-4.5"
    assert downloaded.path.is_relative_to(cache)
    assert downloaded.fingerprint == model.fingerprint


def test_only_what_mlx_lm_reads_is_fetched_and_no_code(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos["owner/tiny"] = files
    locate("owner/tiny")
    assert hub.fetched == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_hub_gets_the_token(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos["owner/tiny"] = files
    locate("owner/tiny")
    assert {call.authorization for call in hub.calls} == {f"Bearer {SECRET}"}


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos["owner/tiny"] = files
    path = locate("owner/tiny")
    hub.calls.clear()
    assert locate("owner/tiny") == path
    assert hub.fetched == []


def test_a_download_that_breaks_off_is_resumed_where_it_broke(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB
    hub.repos["owner/tiny"] = files
    hub.cuts["model.safetensors"] = [100_000, 50_000]
    path = locate("owner/tiny")
    ranges = [call.range for call in hub.calls if call.file == "model.safetensors"]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_download_that_fails_for_good_keeps_its_complete_files(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    hub.repos["owner/tiny"] = files
    hub.cuts["model.safetensors"] = [0] * 6
    text = complaint("owner/tiny")
    assert "the download failed" in text
    assert "try again" in text
    hub.calls.clear()
    locate("owner/tiny")
    assert hub.fetched == ["model.safetensors"]


def test_without_a_network_the_cache_is_enough(
    cache: Path, checkpoint: Path, model: LoadedModel
) -> None:
    snapshot = save_in_cache(cache, "owner/tiny", checkpoint)
    cached = loaded("owner/tiny")
    assert cached.path == snapshot
    assert cached.fingerprint == model.fingerprint


def test_offline_the_hub_is_not_called(
    hub: Hub, cache: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_in_cache(cache, "owner/tiny", checkpoint)
    assert loaded("owner/tiny").id == "owner/tiny"
    assert hub.calls == []


def test_offline_and_not_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = complaint("owner/tiny")
    assert "cache" in text
    assert "HF_HUB_OFFLINE is set: unset it" in text


def test_no_network_and_not_in_the_cache(cache: Path) -> None:
    text = complaint("owner/tiny")
    assert "cache" in text
    assert "check the network" in text


def test_a_cache_with_a_file_missing_is_not_taken_for_the_model(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["owner/tiny"] = files
    (locate("owner/tiny") / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not all of it" in complaint("owner/tiny")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (GATED, ("gated", "accept its terms", "HF_TOKEN")),
        (None, ("no such path and no such repository", "HF_TOKEN")),
        (BAD_TOKEN, ("401", "check HF_TOKEN")),
        (BUSY, ("503", "check the network")),
    ],
    ids=["gated", "not found", "bad token", "busy"],
)
def test_a_refusal_of_the_hub_is_explained(
    hub: Hub, refusal: Refusal | None, words: tuple[str, ...]
) -> None:
    if refusal is not None:
        hub.repos["owner/tiny"] = refusal
    text = complaint("owner/tiny")
    for word in ("owner/tiny", *words):
        assert word in text


def test_a_repository_of_ggufs_is_no_mlx_model(hub: Hub) -> None:
    hub.repos["owner/tiny"] = {"model.gguf": b"GGUF", "README.md": b""}
    assert "no config.json" in complaint("owner/tiny")
    assert hub.fetched == []


def test_the_hub_is_set_by_the_environment_and_progress_is_on_stderr(
    tmp_path: Path, files: dict[str, bytes], model: LoadedModel
) -> None:
    code = (
        "from mlxlite import Config; from mlxlite.models.load import load;"
        "print(load(Config(model='owner/tiny'))[1].fingerprint)"
    )
    environ = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": SECRET}
    with Hub({"owner/tiny": files}) as hub:
        process = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | environ | {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"},
            cwd=DEMO_PATH.parent.parent,
            timeout=100,
        )
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{model.fingerprint}\n"
    assert "100%" in process.stderr
    assert SECRET not in process.stderr
    assert (tmp_path / "hub" / "models--owner--tiny").is_dir()
