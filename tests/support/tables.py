"""The README's table of flags, from the fields of Config."""

from dataclasses import fields

from mlxlite.config.flags import default_text, env_names, meta, option_strings
from mlxlite.config.options import Config


def flag_table() -> str:
    """The README's table of flags, in Markdown: one row a flag, the groups as rows in bold."""
    rows = ["| Flag | Default | Environment | Meaning |", "|---|---|---|---|"]
    group = None
    for f in fields(Config):
        flag = meta(f)
        if flag.group != group:
            group = flag.group
            rows.append(f"| **{group}** | | | |")
        names = ", ".join(f"`{name}`" for name in option_strings(f))
        env = ", ".join(f"`{name}`" for name in env_names(f))
        is_literal = flag.default_text is None and f.default not in (None, ())
        default = f"`{default_text(f)}`" if is_literal else default_text(f)
        cells = [cell.replace("|", r"\|") for cell in (names, default, env, flag.help)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
