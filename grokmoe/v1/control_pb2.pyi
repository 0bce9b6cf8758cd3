from grokmoe.v1 import adapter_pb2 as _adapter_pb2
from grokmoe.v1 import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_ATTENTION: _ClassVar[WorkerRole]
    WORKER_ROLE_EXPERT: _ClassVar[WorkerRole]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_JOINING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_SUSPECT: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_DEAD: _ClassVar[WorkerState]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_ATTENTION: WorkerRole
WORKER_ROLE_EXPERT: WorkerRole
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_JOINING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_SUSPECT: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_DEAD: WorkerState

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdapterStatus(_message.Message):
    __slots__ = ("adapter", "sequences", "workers", "leaving")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    sequences: int
    workers: int
    leaving: bool
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ..., sequences: _Optional[int] = ..., workers: _Optional[int] = ..., leaving: _Optional[bool] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterStatus]
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterStatus, _Mapping]]] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("drain_seconds",)
    DRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    drain_seconds: float
    def __init__(self, drain_seconds: _Optional[float] = ...) -> None: ...

class MoveExpertsRequest(_message.Message):
    __slots__ = ("experts", "to")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[_expert_pb2.ExpertRange]
    to: str
    def __init__(self, experts: _Optional[_Iterable[_Union[_expert_pb2.ExpertRange, _Mapping]]] = ..., to: _Optional[str] = ..., **kwargs) -> None: ...

class MoveExpertsResponse(_message.Message):
    __slots__ = ("loaded_bytes", "load_seconds", "drain_seconds", "placement_version")
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    loaded_bytes: int
    load_seconds: float
    drain_seconds: float
    placement_version: int
    def __init__(self, loaded_bytes: _Optional[int] = ..., load_seconds: _Optional[float] = ..., drain_seconds: _Optional[float] = ..., placement_version: _Optional[int] = ...) -> None: ...

class RebalanceExpertsRequest(_message.Message):
    __slots__ = ("dry_run", "force")
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    force: bool
    def __init__(self, dry_run: _Optional[bool] = ..., force: _Optional[bool] = ...) -> None: ...

class RebalanceExpertsResponse(_message.Message):
    __slots__ = ("moves", "imbalance", "forecast_imbalance", "gain_seconds", "cost_seconds", "done", "reason")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    FORECAST_IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    GAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[ExpertMove]
    imbalance: float
    forecast_imbalance: float
    gain_seconds: float
    cost_seconds: float
    done: bool
    reason: str
    def __init__(self, moves: _Optional[_Iterable[_Union[ExpertMove, _Mapping]]] = ..., imbalance: _Optional[float] = ..., forecast_imbalance: _Optional[float] = ..., gain_seconds: _Optional[float] = ..., cost_seconds: _Optional[float] = ..., done: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class ExpertMove(_message.Message):
    __slots__ = ("experts", "to", "phase")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[_expert_pb2.ExpertRange]
    to: str
    phase: str
    def __init__(self, experts: _Optional[_Iterable[_Union[_expert_pb2.ExpertRange, _Mapping]]] = ..., to: _Optional[str] = ..., phase: _Optional[str] = ..., **kwargs) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted_ids",)
    ABORTED_IDS_FIELD_NUMBER: _ClassVar[int]
    aborted_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, aborted_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PipelineStage(_message.Message):
    __slots__ = ("address", "layer_begin", "layer_end", "device", "incarnation")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    address: str
    layer_begin: int
    layer_end: int
    device: str
    incarnation: str
    def __init__(self, address: _Optional[str] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., device: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("role", "index", "address", "state", "incarnation", "device", "experts", "num_pages", "used_pages", "cached_pages", "held", "loading", "rows_per_second", "stages")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    USED_PAGES_FIELD_NUMBER: _ClassVar[int]
    CACHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    role: WorkerRole
    index: int
    address: str
    state: WorkerState
    incarnation: str
    device: str
    experts: _containers.RepeatedScalarFieldContainer[int]
    num_pages: int
    used_pages: int
    cached_pages: int
    held: _containers.RepeatedCompositeFieldContainer[_expert_pb2.ExpertRange]
    loading: _containers.RepeatedCompositeFieldContainer[_expert_pb2.ExpertRange]
    rows_per_second: float
    stages: _containers.RepeatedCompositeFieldContainer[PipelineStage]
    def __init__(self, role: _Optional[_Union[WorkerRole, str]] = ..., index: _Optional[int] = ..., address: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., incarnation: _Optional[str] = ..., device: _Optional[str] = ..., experts: _Optional[_Iterable[int]] = ..., num_pages: _Optional[int] = ..., used_pages: _Optional[int] = ..., cached_pages: _Optional[int] = ..., held: _Optional[_Iterable[_Union[_expert_pb2.ExpertRange, _Mapping]]] = ..., loading: _Optional[_Iterable[_Union[_expert_pb2.ExpertRange, _Mapping]]] = ..., rows_per_second: _Optional[float] = ..., stages: _Optional[_Iterable[_Union[PipelineStage, _Mapping]]] = ...) -> None: ...

class ExpertPlacement(_message.Message):
    __slots__ = ("expert", "workers", "rows", "slice", "num_slices")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    expert: int
    workers: _containers.RepeatedScalarFieldContainer[int]
    rows: int
    slice: int
    num_slices: int
    def __init__(self, expert: _Optional[int] = ..., workers: _Optional[_Iterable[int]] = ..., rows: _Optional[int] = ..., slice: _Optional[int] = ..., num_slices: _Optional[int] = ...) -> None: ...

class LegLatency(_message.Message):
    __slots__ = ("leg", "total_seconds", "count")
    LEG_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    leg: str
    total_seconds: float
    count: int
    def __init__(self, leg: _Optional[str] = ..., total_seconds: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("workers", "placement", "waiting", "running", "steps", "preemptions", "legs", "placement_version", "imbalance", "moves")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    LEGS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    placement: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    waiting: int
    running: int
    steps: int
    preemptions: int
    legs: _containers.RepeatedCompositeFieldContainer[LegLatency]
    placement_version: int
    imbalance: float
    moves: _containers.RepeatedCompositeFieldContainer[ExpertMove]
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., placement: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., steps: _Optional[int] = ..., preemptions: _Optional[int] = ..., legs: _Optional[_Iterable[_Union[LegLatency, _Mapping]]] = ..., placement_version: _Optional[int] = ..., imbalance: _Optional[float] = ..., moves: _Optional[_Iterable[_Union[ExpertMove, _Mapping]]] = ...) -> None: ...
