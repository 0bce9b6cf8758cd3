"""grokmoe: what all roles share, and the client SDK."""

from importlib import metadata as _metadata

from grokmoe.client import AsyncClient
from grokmoe.cluster_status import (
    ExpertMove,
    ExpertPlacement,
    ExpertRange,
    LegLatency,
    MoveCost,
    PipelineStage,
    Rebalance,
    Status,
    Worker,
    WorkerRole,
    WorkerState,
)
from grokmoe.connection import ClientOptions
from grokmoe.credentials import TlsConfig
from grokmoe.embeds import Embeds
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
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Retryable,
    StartupError,
    Unauthenticated,
    Unavailable,
)
from grokmoe.logprobs import TokenLogprob, TopLogprobs
from grokmoe.options import GenerateOptions, ScoreOptions, TokenizeOptions
from grokmoe.results import (
    Candidate,
    Completion,
    Delta,
    FinishReason,
    ModelInfo,
    ScoreResult,
    Timing,
    Tokens,
    Usage,
)
from grokmoe.stream import AsyncStream
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
    "Candidate",
    "CheckpointError",
    "Client",
    "ClientOptions",
    "Code",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "Embeds",
    "ExpertMove",
    "ExpertPlacement",
    "ExpertRange",
    "FailedPrecondition",
    "FinishReason",
    "GenerateOptions",
    "GrokmoeError",
    "InternalError",
    "InvalidRequest",
    "LegLatency",
    "ModelInfo",
    "MoveCost",
    "NotFound",
    "PermissionDenied",
    "PipelineStage",
    "Reason",
    "Rebalance",
    "ResourceExhausted",
    "Retryable",
    "ScoreOptions",
    "ScoreResult",
    "StartupError",
    "Status",
    "Stream",
    "Timing",
    "TlsConfig",
    "TokenLogprob",
    "TokenizeOptions",
    "Tokens",
    "TopLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Worker",
    "WorkerRole",
    "WorkerState",
    "__version__",
]
