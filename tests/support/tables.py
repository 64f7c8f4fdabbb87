"""The README's table of flags, from the fields of Config."""

from dataclasses import fields, replace
from typing import Any

from mlxlite.config.flags import default_text, env_names, meta, option_strings
from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams


def flag_table() -> str:
    """The README's table of flags, in Markdown: one row a flag, the headings as rows in bold."""
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
