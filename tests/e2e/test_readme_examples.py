"""The README's examples, run as they are written against the demo model."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import serving

import mlxlite

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8080"
EXAMPLES = README.partition("<!-- examples -->")[2].partition("<!-- /examples -->")[0]
COMMANDS = re.findall(r"^\$ (curl (?:.*\\\n)*.*)\n((?:(?!\$ |```).*\n)*)", EXAMPLES, re.M)
VARIES = ("id", "created", "timings")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(mlxlite.Config(port=0)) as server:
        yield server.url


def printed_by(command: str, url: str) -> str:
    arguments = shlex.split(command.replace("\\\n", " ").replace(URL, url))
    return subprocess.run(arguments, capture_output=True, check=True, text=True, timeout=60).stdout


def steady(value: Any) -> Any:
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {k: None if k in VARIES else steady(item) for k, item in value.items()}
    return [steady(item) for item in value] if isinstance(value, list) else value


def test_the_readme_has_examples_of_curl() -> None:
    assert len(COMMANDS) == EXAMPLES.count("$ curl") >= 4


@needs_curl
@pytest.mark.parametrize(("command", "shown"), [c for c in COMMANDS if "stream" not in c[0]])
def test_an_answer_to_curl_is_the_one_shown(command: str, shown: str, url: str) -> None:
    answer = json.loads(printed_by(command, url))
    assert steady(answer) == steady(json.loads(shown.replace("\n", "")))


@needs_curl
@pytest.mark.parametrize(("command", "shown"), [c for c in COMMANDS if "stream" in c[0]])
def test_a_stream_to_curl_has_the_frames_shown(command: str, shown: str, url: str) -> None:
    frames = printed_by(command, url).split("\n\n")
    for frame in re.findall(r"^data: .*$", shown, re.M):
        parts = frame.split("…")  # left out
        parts[0] = re.sub(r'"id":"chatcmpl-\w+$', "", parts[0])
        assert any(all(part in candidate for part in parts) for candidate in frames), frame


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_a_python_example_runs_and_prints_what_it_shows(
    code: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "asyncio" not in code:
        pytest.importorskip("openai" if "openai" in code else "anthropic")
    exec(compile(code.replace(URL, url), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    for shown in re.findall(r"print\(.*\)  # (.*)$", code, re.M):
        assert shown in printed
