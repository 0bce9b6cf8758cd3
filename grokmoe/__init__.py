"""grokmoe: what all roles share, and the client SDK."""

from importlib import metadata as _metadata

from grokmoe.client import AsyncClient, AsyncStream
from grokmoe.errors import (
    AlreadyExists,
    Cancelled,
    CheckpointError,
    Code,
    ConfigError,
    DeadlineExceeded,
    FailedPrecondition,
    GrokmoeError,
    InternalError,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
    Retryable,
    StartupError,
    Unavailable,
)
from grokmoe.options import GenerateOptions
from grokmoe.results import (
    Completion,
    Delta,
    ExpertPlacement,
    FinishReason,
    LegLatency,
    ModelInfo,
    Status,
    Timing,
    Usage,
    Worker,
    WorkerRole,
    WorkerState,
)
from grokmoe.sync_client import Client, Stream

try:
    __version__ = _metadata.version("grokmoe")
except _metadata.PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "CheckpointError",
    "Client",
    "Code",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "ExpertPlacement",
    "FailedPrecondition",
    "FinishReason",
    "GenerateOptions",
    "GrokmoeError",
    "InternalError",
    "InvalidRequest",
    "LegLatency",
    "ModelInfo",
    "NotFound",
    "Reason",
    "ResourceExhausted",
    "Retryable",
    "StartupError",
    "Status",
    "Stream",
    "Timing",
    "Unavailable",
    "Usage",
    "Worker",
    "WorkerRole",
    "WorkerState",
    "__version__",
]
