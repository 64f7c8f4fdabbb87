"""The endpoints, one dialect a file; no file here imports another.

Adding one is a file with its own `ENDPOINTS` and its name here.
"""

from typing import Final

from mlxlite.api.endpoint import Endpoint
from mlxlite.api.endpoints import (
    admin,
    anthropic_messages,
    chat_completions,
    completions,
    embeddings,
    home,
    infill,
    responses,
    tokenize,
)

ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    *chat_completions.ENDPOINTS,
    *completions.ENDPOINTS,
    *infill.ENDPOINTS,
    *responses.ENDPOINTS,
    *anthropic_messages.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *tokenize.ENDPOINTS,
    *admin.ENDPOINTS,
    *home.ENDPOINTS,
)
