"""What the endpoints share: the server's phase, and the loaded model with its engine."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlxlite.engine.engine import Engine
from mlxlite.models.interface import Model


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `/v1/models` tells of the served model."""

    id: str
    created: int
    context_size: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "mlx",
            "max_model_len": self.context_size,
        }


class Phase(Enum):
    """A server's life; only READY answers what needs the model."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    FAILED = "error"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Ready:
    """What there is once the model is loaded."""

    model: Model
    engine: Engine
    card: ModelCard
