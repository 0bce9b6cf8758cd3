from grokmoe.v1 import failure_pb2 as _failure_pb2
from grokmoe.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertLoadRequest(_message.Message):
    __slots__ = ("config_hash", "experts")
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    config_hash: str
    experts: _containers.RepeatedCompositeFieldContainer[ExpertRange]
    def __init__(self, config_hash: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[ExpertRange, _Mapping]]] = ...) -> None: ...

class ExpertLoadResponse(_message.Message):
    __slots__ = ("revision", "loaded_bytes", "load_ns")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_NS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    loaded_bytes: int
    load_ns: int
    def __init__(self, revision: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., load_ns: _Optional[int] = ...) -> None: ...

class ExpertUnloadRequest(_message.Message):
    __slots__ = ("config_hash", "experts")
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    config_hash: str
    experts: _containers.RepeatedCompositeFieldContainer[ExpertRange]
    def __init__(self, config_hash: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[ExpertRange, _Mapping]]] = ...) -> None: ...

class ExpertUnloadResponse(_message.Message):
    __slots__ = ("revision",)
    REVISION_FIELD_NUMBER: _ClassVar[int]
    revision: int
    def __init__(self, revision: _Optional[int] = ...) -> None: ...

class ExpertDescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertDescribeResponse(_message.Message):
    __slots__ = ("config_hash", "incarnation", "dtype", "hidden_size", "experts", "max_rows", "device", "draining", "revision", "loading", "expert_bytes", "capacity", "expert_dtype")
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    config_hash: str
    incarnation: str
    dtype: _tensor_pb2.DataType
    hidden_size: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertRange]
    max_rows: int
    device: str
    draining: bool
    revision: int
    loading: _containers.RepeatedCompositeFieldContainer[ExpertRange]
    expert_bytes: int
    capacity: int
    expert_dtype: str
    def __init__(self, config_hash: _Optional[str] = ..., incarnation: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., hidden_size: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertRange, _Mapping]]] = ..., max_rows: _Optional[int] = ..., device: _Optional[str] = ..., draining: _Optional[bool] = ..., revision: _Optional[int] = ..., loading: _Optional[_Iterable[_Union[ExpertRange, _Mapping]]] = ..., expert_bytes: _Optional[int] = ..., capacity: _Optional[int] = ..., expert_dtype: _Optional[str] = ...) -> None: ...

class ExpertRange(_message.Message):
    __slots__ = ("expert", "layer_begin", "layer_end", "slice", "num_slices")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    expert: int
    layer_begin: int
    layer_end: int
    slice: int
    num_slices: int
    def __init__(self, expert: _Optional[int] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., slice: _Optional[int] = ..., num_slices: _Optional[int] = ...) -> None: ...

class PairOffer(_message.Message):
    __slots__ = ("backend", "host", "port", "name")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    backend: str
    host: str
    port: int
    name: str
    def __init__(self, backend: _Optional[str] = ..., host: _Optional[str] = ..., port: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("request_id", "layer", "expert_ids", "counts", "remaining_rows", "timeout_ms", "slices", "num_slices", "pair_offer", "pair_bytes", "caller", "traceparents", "payload")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_ROWS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    PAIR_OFFER_FIELD_NUMBER: _ClassVar[int]
    PAIR_BYTES_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENTS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    layer: int
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    remaining_rows: int
    timeout_ms: int
    slices: _containers.RepeatedScalarFieldContainer[int]
    num_slices: _containers.RepeatedScalarFieldContainer[int]
    pair_offer: PairOffer
    pair_bytes: int
    caller: str
    traceparents: _containers.RepeatedScalarFieldContainer[str]
    payload: _tensor_pb2.Tensor
    def __init__(self, request_id: _Optional[int] = ..., layer: _Optional[int] = ..., expert_ids: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., remaining_rows: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., slices: _Optional[_Iterable[int]] = ..., num_slices: _Optional[_Iterable[int]] = ..., pair_offer: _Optional[_Union[PairOffer, _Mapping]] = ..., pair_bytes: _Optional[int] = ..., caller: _Optional[str] = ..., traceparents: _Optional[_Iterable[str]] = ..., payload: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("request_id", "remaining_rows", "failure", "queue_ns", "compute_ns", "batch_rows", "revision", "pair_bytes", "pair_lost", "payload")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REMAINING_ROWS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PAIR_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAIR_LOST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    remaining_rows: int
    failure: _failure_pb2.Failure
    queue_ns: int
    compute_ns: int
    batch_rows: int
    revision: int
    pair_bytes: int
    pair_lost: bool
    payload: _tensor_pb2.Tensor
    def __init__(self, request_id: _Optional[int] = ..., remaining_rows: _Optional[int] = ..., failure: _Optional[_Union[_failure_pb2.Failure, _Mapping]] = ..., queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., batch_rows: _Optional[int] = ..., revision: _Optional[int] = ..., pair_bytes: _Optional[int] = ..., pair_lost: _Optional[bool] = ..., payload: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
