"""Prompts whose middle is to be filled in, for models with marks for it. Pure."""

from collections.abc import Sequence

from mlxlite.api.readers import Text
from mlxlite.api.render import prompt_error
from mlxlite.http.errors import not_supported
from mlxlite.models.interface import FillMarks, Model, PromptError

REPOSITORY = "myproject"  # llama-server's name of a repository that has none
FILE = "filename"  # and of the file that is filled in


def marks_of(model: Model, param: str) -> FillMarks:
    """Raises APIError 400 for a model that fills in no middle."""
    if model.fill_marks is None:
        raise not_supported(f"'{param}': this model has no marks for a middle to fill in.", param)
    return model.fill_marks


def fill_in_tokens(
    model: Model,
    prefix: Text,
    suffix: str,
    param: str,
    *,
    files: Sequence[tuple[str, str]] = (),
    begun: str = "",
) -> tuple[int, ...]:
    """The prompt, as the models were trained: prefix, suffix, and the beginning of the middle.

    `files` are the names and texts of others, which come first. Raises APIError.
    """
    marks = marks_of(model, param)

    def tokens(text: Text) -> tuple[int, ...]:
        return model.encode(text, add_special=False) if isinstance(text, str) else text

    try:
        start = list(model.encode("", add_special=True))
        if files and marks.repository is not None:
            start += (marks.repository, *tokens(f"{REPOSITORY}\n"))
        for name, text in files:
            start += () if marks.file is None else (marks.file,)
            start += tokens(f"{name}\n{text}\n")
        if files and marks.file is not None:
            start += (marks.file, *tokens(f"{FILE}\n"))
        own = (marks.prefix, *tokens(prefix), marks.suffix, *tokens(suffix), marks.middle)
        return (*start, *own, *tokens(begun))
    except PromptError as error:
        raise prompt_error(model, error, param) from error
