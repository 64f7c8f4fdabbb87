"""The tables in the READMEs, generated from the code: endpoints, request fields, flags.

To write them anew: `python -m tests.support.tables`.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mlxlite.api.endpoint import Endpoint
from mlxlite.api.endpoints import ENDPOINTS
from mlxlite.api.fields import kinds_markdown, markdown
from mlxlite.api.openapi import openapi_endpoint
from mlxlite.config.flags import default_text, env_names, meta, option_strings
from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "mlxlite"


def tables() -> dict[tuple[Path, str], str]:
    """All tables that are generated, by the file and the marker that they stand between."""
    return {
        (PACKAGE / "api" / "README.md", "endpoints"): endpoint_table(),
        (PACKAGE / "api" / "README.md", "fields"): field_tables(),
        (PACKAGE / "config" / "README.md", "flags"): flag_table(),
    }


def shown(text: str, name: str) -> str:
    """What stands between the markers of this name. Raises ValueError without them."""
    _, opening, rest = text.partition(f"<!-- {name} -->\n")
    inner, closing, _ = rest.partition(f"<!-- /{name} -->")
    if not (opening and closing):
        raise ValueError(f"no markers <!-- {name} --> … <!-- /{name} -->")
    return inner


def write_tables() -> None:
    """Bring the tables in the READMEs up to date."""
    for (path, name), table in tables().items():
        text = path.read_text(encoding="utf-8")
        before = f"<!-- {name} -->\n{shown(text, name)}<!-- /{name} -->"
        after = f"<!-- {name} -->\n{table}<!-- /{name} -->"
        path.write_text(text.replace(before, after), encoding="utf-8")


def endpoint_table() -> str:
    """The operations of the API, in Markdown: one row each, with a link to its fields."""
    rows = ["| endpoint | | key |", "| --- | --- | --- |"]
    for endpoint in _endpoints():
        name = f"`{endpoint.method} {endpoint.path}`"
        if endpoint.fields is not None:
            anchor = name.lower().replace("/", "").strip("`").replace(" ", "-")
            name = f"[{name}](#{anchor})"
        summary = endpoint.summary[:1].lower() + endpoint.summary[1:]
        rows.append(f"| {name} | {summary} | {'no' if endpoint.is_open else 'yes'} |")
    return "\n".join(rows) + "\n"


def field_tables() -> str:
    """The request fields of each operation that has some, in Markdown."""
    parts = []
    for endpoint in _endpoints():
        if endpoint.fields is not None:
            opening = f"<details><summary>{len(endpoint.fields)} fields</summary>"
            tables = [markdown(endpoint.fields)]
            for what, kinds in endpoint.kinds.items():
                tables += [f"Types of {what}:", kinds_markdown(kinds)]
            heading = f"### `{endpoint.method} {endpoint.path}`"
            parts += [heading, opening, *tables, "</details>"]
    return "\n\n".join(parts) + "\n"


def _endpoints() -> tuple[Endpoint, ...]:
    return (*ENDPOINTS, openapi_endpoint(ENDPOINTS))


def flag_table() -> str:
    """The flags, in Markdown: one row a flag, the headings as rows in bold."""
    rows = ["| Flag | Default | Environment | Meaning |", "|---|---|---|---|"]
    for f in fields(Config):
        flag = meta(f)
        if flag.heading is not None:
            rows.append(f"| **{flag.heading}** | | | |")
        names = ", ".join(f"`{name}`" for name in option_strings(f))
        env = ", ".join(f"`{name}`" for name in env_names(f))
        is_literal = flag.default_text is None and f.default not in (None, ())
        default = f"`{default_text(f)}`" if is_literal else default_text(f)
        cells = [cell.replace("|", r"\|") for cell in (names, default, env, flag.help)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def arrived(request: Any, attribute: str) -> Any:
    """What a request sets: one of its own attributes, or a sampling parameter."""
    if attribute in {item.name for item in fields(SamplingParams)}:
        return request.sampling.get(attribute)
    return getattr(request, attribute)


def with_value(request: Any, attribute: str, value: Any) -> Any:
    """The same request with one attribute or sampling parameter set; None: not set."""
    if attribute not in {item.name for item in fields(SamplingParams)}:
        return replace(request, **{attribute: value})
    rest = {name: item for name, item in request.sampling.items() if name != attribute}
    return replace(request, sampling=rest if value is None else rest | {attribute: value})


if __name__ == "__main__":
    write_tables()
