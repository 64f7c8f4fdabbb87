"""One operation of the API, as the router, the OpenAPI document and the metrics read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlxlite.api.fields import Kinds, Table, Use
from mlxlite.api.service import Service
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import ErrorBody, error_body

Handler = Callable[[Service, Exchange, bytes], None]
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A method of a path; `{id}` in the path is the rest of it.

    `handle` answers a request whose body is complete, or raises APIError. `fields` are those of the
    body; `answer_schema` names the schema of a 200.
    """

    method: str
    path: str
    summary: str
    handle: Handler
    fields: Table | None = None
    answer_schema: str = "Object"
    media_type: str = JSON
    is_open: bool = False  # needs no API key
    error_body: ErrorBody = error_body  # errors in the form of the endpoint's dialect
    kinds: Mapping[str, Kinds] = field(default_factory=dict)  # types inside of fields, by what

    @property
    def is_stream(self) -> bool:
        stream = None if self.fields is None else self.fields.get("stream")
        return stream is not None and stream.use is Use.SUPPORTED
