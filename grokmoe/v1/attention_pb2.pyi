from grokmoe.v1 import failure_pb2 as _failure_pb2
from grokmoe.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogitsScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOGITS_SCOPE_UNSPECIFIED: _ClassVar[LogitsScope]
    LOGITS_SCOPE_ALL: _ClassVar[LogitsScope]
LOGITS_SCOPE_UNSPECIFIED: LogitsScope
LOGITS_SCOPE_ALL: LogitsScope

class AttentionDescribeRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class AttentionDescribeResponse(_message.Message):
    __slots__ = ("config_hash", "incarnation", "dtype", "hidden_size", "layer_begin", "layer_end", "num_pages", "page_size", "max_step_tokens", "device", "draining", "tensor_parallel")
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    config_hash: str
    incarnation: str
    dtype: _tensor_pb2.DataType
    hidden_size: int
    layer_begin: int
    layer_end: int
    num_pages: int
    page_size: int
    max_step_tokens: int
    device: str
    draining: bool
    tensor_parallel: int
    def __init__(self, config_hash: _Optional[str] = ..., incarnation: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., hidden_size: _Optional[int] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., device: _Optional[str] = ..., draining: _Optional[bool] = ..., tensor_parallel: _Optional[int] = ...) -> None: ...

class Penalties(_message.Message):
    __slots__ = ("repetition", "frequency", "presence", "prompt_ids", "output_ids")
    REPETITION_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    repetition: float
    frequency: float
    presence: float
    prompt_ids: bytes
    output_ids: bytes
    def __init__(self, repetition: _Optional[float] = ..., frequency: _Optional[float] = ..., presence: _Optional[float] = ..., prompt_ids: _Optional[bytes] = ..., output_ids: _Optional[bytes] = ...) -> None: ...

class TokenSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "min_p", "bias_ids", "bias", "penalties", "allowed", "num_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    PENALTIES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    bias: _containers.RepeatedScalarFieldContainer[float]
    penalties: Penalties
    allowed: bytes
    num_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., min_p: _Optional[float] = ..., bias_ids: _Optional[_Iterable[int]] = ..., bias: _Optional[_Iterable[float]] = ..., penalties: _Optional[_Union[Penalties, _Mapping]] = ..., allowed: _Optional[bytes] = ..., num_logprobs: _Optional[int] = ...) -> None: ...

class TokenScoring(_message.Message):
    __slots__ = ("first", "target_ids", "num_top")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    first: int
    target_ids: _containers.RepeatedScalarFieldContainer[int]
    num_top: int
    def __init__(self, first: _Optional[int] = ..., target_ids: _Optional[_Iterable[int]] = ..., num_top: _Optional[int] = ...) -> None: ...

class SequenceChunk(_message.Message):
    __slots__ = ("token_ids", "start", "page_ids", "sampling", "logits", "scoring", "num_embeds")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    SCORING_FIELD_NUMBER: _ClassVar[int]
    NUM_EMBEDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    start: int
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: TokenSampling
    logits: LogitsScope
    scoring: TokenScoring
    num_embeds: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., page_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[TokenSampling, _Mapping]] = ..., logits: _Optional[_Union[LogitsScope, str]] = ..., scoring: _Optional[_Union[TokenScoring, _Mapping]] = ..., num_embeds: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("incarnation", "chunks", "traceparents")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENTS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    chunks: _containers.RepeatedCompositeFieldContainer[SequenceChunk]
    traceparents: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, incarnation: _Optional[str] = ..., chunks: _Optional[_Iterable[_Union[SequenceChunk, _Mapping]]] = ..., traceparents: _Optional[_Iterable[str]] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("step_id", "plan", "layer", "remaining_rows", "payload")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    REMAINING_ROWS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    plan: StepPlan
    layer: int
    remaining_rows: int
    payload: _tensor_pb2.Tensor
    def __init__(self, step_id: _Optional[int] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., layer: _Optional[int] = ..., remaining_rows: _Optional[int] = ..., payload: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class LogprobTable(_message.Message):
    __slots__ = ("token_ids", "logprobs", "ranks", "num_top", "top_ids", "top_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    num_top: int
    top_ids: bytes
    top_logprobs: bytes
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ..., num_top: _Optional[int] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("token_ids", "logprobs", "faulty_chunks", "is_hidden_state")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAULTY_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    IS_HIDDEN_STATE_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[LogprobTable]
    faulty_chunks: _containers.RepeatedScalarFieldContainer[int]
    is_hidden_state: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[LogprobTable, _Mapping]]] = ..., faulty_chunks: _Optional[_Iterable[int]] = ..., is_hidden_state: _Optional[bool] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("step_id", "layer", "remaining_rows", "result", "failure", "compute_ns", "stages_ns", "payload")
    class StagesNsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    REMAINING_ROWS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    STAGES_NS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    layer: int
    remaining_rows: int
    result: StepResult
    failure: _failure_pb2.Failure
    compute_ns: int
    stages_ns: _containers.ScalarMap[str, int]
    payload: _tensor_pb2.Tensor
    def __init__(self, step_id: _Optional[int] = ..., layer: _Optional[int] = ..., remaining_rows: _Optional[int] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., failure: _Optional[_Union[_failure_pb2.Failure, _Mapping]] = ..., compute_ns: _Optional[int] = ..., stages_ns: _Optional[_Mapping[str, int]] = ..., payload: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
