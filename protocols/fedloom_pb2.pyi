# mypy: disable-error-code="type-arg"
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FP32: _ClassVar[Dtype]
    DTYPE_FP16: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
    DTYPE_INT8: _ClassVar[Dtype]

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_TRAIN: _ClassVar[Kind]
    KIND_EVALUATE: _ClassVar[Kind]

class Start(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    START_UNSPECIFIED: _ClassVar[Start]
    START_FRESH: _ClassVar[Start]
    START_PATCH: _ClassVar[Start]
    START_GIVEN: _ClassVar[Start]
    START_OWN: _ClassVar[Start]

class Family(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAMILY_UNSPECIFIED: _ClassVar[Family]
    FAMILY_GAUSSIAN: _ClassVar[Family]
    FAMILY_RADEMACHER: _ClassVar[Family]
    FAMILY_SKETCH: _ClassVar[Family]

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_ALL: _ClassVar[Scope]
    SCOPE_LORA: _ClassVar[Scope]
    SCOPE_MASK: _ClassVar[Scope]

class Over(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVER_UNSPECIFIED: _ClassVar[Over]
    OVER_POOL: _ClassVar[Over]
    OVER_STEPS: _ClassVar[Over]
    OVER_BASIS: _ClassVar[Over]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FP32: Dtype
DTYPE_FP16: Dtype
DTYPE_BF16: Dtype
DTYPE_INT8: Dtype
KIND_UNSPECIFIED: Kind
KIND_TRAIN: Kind
KIND_EVALUATE: Kind
START_UNSPECIFIED: Start
START_FRESH: Start
START_PATCH: Start
START_GIVEN: Start
START_OWN: Start
FAMILY_UNSPECIFIED: Family
FAMILY_GAUSSIAN: Family
FAMILY_RADEMACHER: Family
FAMILY_SKETCH: Family
SCOPE_UNSPECIFIED: Scope
SCOPE_ALL: Scope
SCOPE_LORA: Scope
SCOPE_MASK: Scope
OVER_UNSPECIFIED: Over
OVER_POOL: Over
OVER_STEPS: Over
OVER_BASIS: Over

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class LowRank(_message.Message):
    __slots__ = ("name", "rank", "alpha", "rslora", "b", "a")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    RSLORA_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    alpha: float
    rslora: bool
    b: Tensor
    a: Tensor
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., rslora: _Optional[bool] = ..., b: _Optional[_Union[Tensor, _Mapping]] = ..., a: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Dense(_message.Message):
    __slots__ = ("name", "tensor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensor: Tensor
    def __init__(self, name: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Subspace(_message.Message):
    __slots__ = ("family", "k", "seed", "scope", "rank", "alpha", "rslora", "mask", "directions")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    RSLORA_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    DIRECTIONS_FIELD_NUMBER: _ClassVar[int]
    family: Family
    k: int
    seed: int
    scope: Scope
    rank: int
    alpha: float
    rslora: bool
    mask: bytes
    directions: int
    def __init__(self, family: _Optional[_Union[Family, str]] = ..., k: _Optional[int] = ..., seed: _Optional[int] = ..., scope: _Optional[_Union[Scope, str]] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., rslora: _Optional[bool] = ..., mask: _Optional[bytes] = ..., directions: _Optional[int] = ...) -> None: ...

class Scalars(_message.Message):
    __slots__ = ("over", "k", "dtype", "count", "seed", "equal")
    OVER_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EQUAL_FIELD_NUMBER: _ClassVar[int]
    over: Over
    k: int
    dtype: Dtype
    count: int
    seed: int
    equal: bool
    def __init__(self, over: _Optional[_Union[Over, str]] = ..., k: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., count: _Optional[int] = ..., seed: _Optional[int] = ..., equal: _Optional[bool] = ...) -> None: ...

class Coefficients(_message.Message):
    __slots__ = ("subspace", "exponent", "data_bytes")
    SUBSPACE_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    subspace: Subspace
    exponent: int
    data_bytes: int
    def __init__(self, subspace: _Optional[_Union[Subspace, _Mapping]] = ..., exponent: _Optional[int] = ..., data_bytes: _Optional[int] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("name", "units", "bits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    units: int
    bits: bytes
    def __init__(self, name: _Optional[str] = ..., units: _Optional[int] = ..., bits: _Optional[bytes] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("factors", "dense", "data_bytes", "data_crc32", "scalars", "coefficients", "keep")
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_CRC32_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    factors: _containers.RepeatedCompositeFieldContainer[LowRank]
    dense: _containers.RepeatedCompositeFieldContainer[Dense]
    data_bytes: int
    data_crc32: int
    scalars: Scalars
    coefficients: Coefficients
    keep: _containers.RepeatedCompositeFieldContainer[Keep]
    def __init__(self, factors: _Optional[_Iterable[_Union[LowRank, _Mapping]]] = ..., dense: _Optional[_Iterable[_Union[Dense, _Mapping]]] = ..., data_bytes: _Optional[int] = ..., data_crc32: _Optional[int] = ..., scalars: _Optional[_Union[Scalars, _Mapping]] = ..., coefficients: _Optional[_Union[Coefficients, _Mapping]] = ..., keep: _Optional[_Iterable[_Union[Keep, _Mapping]]] = ...) -> None: ...

class Patch(_message.Message):
    __slots__ = ("base_hash", "since", "version", "payload", "base_hash_hex")
    BASE_HASH_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    BASE_HASH_HEX_FIELD_NUMBER: _ClassVar[int]
    base_hash: str
    since: int
    version: int
    payload: Payload
    base_hash_hex: bytes
    def __init__(self, base_hash: _Optional[str] = ..., since: _Optional[int] = ..., version: _Optional[int] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., base_hash_hex: _Optional[bytes] = ...) -> None: ...

class ModuleRank(_message.Message):
    __slots__ = ("name", "rank")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class Knob(_message.Message):
    __slots__ = ("name", "integer", "real", "text", "flag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    integer: int
    real: float
    text: str
    flag: bool
    def __init__(self, name: _Optional[str] = ..., integer: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ..., flag: _Optional[bool] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("device", "round", "rank", "alpha", "start_from", "kind", "tuner", "rslora", "train_a", "shared_a_seed", "send", "start", "patch", "run", "nonce", "seed", "state_round", "wire", "knobs", "subspace", "scalar_limit", "run_hex", "strategy", "ranks")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    START_FROM_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TUNER_FIELD_NUMBER: _ClassVar[int]
    RSLORA_FIELD_NUMBER: _ClassVar[int]
    TRAIN_A_FIELD_NUMBER: _ClassVar[int]
    SHARED_A_SEED_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STATE_ROUND_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    SUBSPACE_FIELD_NUMBER: _ClassVar[int]
    SCALAR_LIMIT_FIELD_NUMBER: _ClassVar[int]
    RUN_HEX_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    device: str
    round: int
    rank: int
    alpha: float
    start_from: Start
    kind: Kind
    tuner: str
    rslora: bool
    train_a: bool
    shared_a_seed: int
    send: bool
    start: Payload
    patch: Patch
    run: str
    nonce: int
    seed: int
    state_round: int
    wire: Dtype
    knobs: _containers.RepeatedCompositeFieldContainer[Knob]
    subspace: Subspace
    scalar_limit: float
    run_hex: bytes
    strategy: str
    ranks: _containers.RepeatedCompositeFieldContainer[ModuleRank]
    def __init__(self, device: _Optional[str] = ..., round: _Optional[int] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., start_from: _Optional[_Union[Start, str]] = ..., kind: _Optional[_Union[Kind, str]] = ..., tuner: _Optional[str] = ..., rslora: _Optional[bool] = ..., train_a: _Optional[bool] = ..., shared_a_seed: _Optional[int] = ..., send: _Optional[bool] = ..., start: _Optional[_Union[Payload, _Mapping]] = ..., patch: _Optional[_Union[Patch, _Mapping]] = ..., run: _Optional[str] = ..., nonce: _Optional[int] = ..., seed: _Optional[int] = ..., state_round: _Optional[int] = ..., wire: _Optional[_Union[Dtype, str]] = ..., knobs: _Optional[_Iterable[_Union[Knob, _Mapping]]] = ..., subspace: _Optional[_Union[Subspace, _Mapping]] = ..., scalar_limit: _Optional[float] = ..., run_hex: _Optional[bytes] = ..., strategy: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[ModuleRank, _Mapping]]] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("seconds", "peak_rss_bytes", "out_of_memory", "peak_tensor_bytes")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PEAK_TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    peak_rss_bytes: int
    out_of_memory: bool
    peak_tensor_bytes: int
    def __init__(self, seconds: _Optional[float] = ..., peak_rss_bytes: _Optional[int] = ..., out_of_memory: _Optional[bool] = ..., peak_tensor_bytes: _Optional[int] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("device", "round", "examples", "kind", "run", "nonce", "metrics", "cost", "payload", "run_hex")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    RUN_HEX_FIELD_NUMBER: _ClassVar[int]
    device: str
    round: int
    examples: int
    kind: Kind
    run: str
    nonce: int
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    cost: Cost
    payload: Payload
    run_hex: bytes
    def __init__(self, device: _Optional[str] = ..., round: _Optional[int] = ..., examples: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ..., run: _Optional[str] = ..., nonce: _Optional[int] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., run_hex: _Optional[bytes] = ...) -> None: ...

class DeviceReport(_message.Message):
    __slots__ = ("device", "examples", "rank", "version", "state_round", "capabilities", "software", "memory")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_ROUND_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    device: str
    examples: int
    rank: int
    version: int
    state_round: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    software: str
    memory: int
    def __init__(self, device: _Optional[str] = ..., examples: _Optional[int] = ..., rank: _Optional[int] = ..., version: _Optional[int] = ..., state_round: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., software: _Optional[str] = ..., memory: _Optional[int] = ...) -> None: ...

class Axis(_message.Message):
    __slots__ = ("group", "width", "offsets")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    group: str
    width: int
    offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, group: _Optional[str] = ..., width: _Optional[int] = ..., offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class Matrix(_message.Message):
    __slots__ = ("name", "d_out", "d_in", "kind", "rows", "columns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    D_OUT_FIELD_NUMBER: _ClassVar[int]
    D_IN_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    name: str
    d_out: int
    d_in: int
    kind: str
    rows: Axis
    columns: Axis
    def __init__(self, name: _Optional[str] = ..., d_out: _Optional[int] = ..., d_in: _Optional[int] = ..., kind: _Optional[str] = ..., rows: _Optional[_Union[Axis, _Mapping]] = ..., columns: _Optional[_Union[Axis, _Mapping]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "units")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    units: int
    def __init__(self, name: _Optional[str] = ..., units: _Optional[int] = ...) -> None: ...

class DenseShape(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ShapeBlock(_message.Message):
    __slots__ = ("heads", "kv_heads", "head_dim", "ffn")
    HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    FFN_FIELD_NUMBER: _ClassVar[int]
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    def __init__(self, heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., ffn: _Optional[int] = ...) -> None: ...

class ShapeLinear(_message.Message):
    __slots__ = ("name", "block", "reads", "d_out", "d_in")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    D_OUT_FIELD_NUMBER: _ClassVar[int]
    D_IN_FIELD_NUMBER: _ClassVar[int]
    name: str
    block: int
    reads: str
    d_out: int
    d_in: int
    def __init__(self, name: _Optional[str] = ..., block: _Optional[int] = ..., reads: _Optional[str] = ..., d_out: _Optional[int] = ..., d_in: _Optional[int] = ...) -> None: ...

class Shapes(_message.Message):
    __slots__ = ("family", "hidden", "blocks", "linears", "columns", "other", "head", "item")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LINEARS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    family: str
    hidden: int
    blocks: _containers.RepeatedCompositeFieldContainer[ShapeBlock]
    linears: _containers.RepeatedCompositeFieldContainer[ShapeLinear]
    columns: int
    other: int
    head: int
    item: int
    def __init__(self, family: _Optional[str] = ..., hidden: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[ShapeBlock, _Mapping]]] = ..., linears: _Optional[_Iterable[_Union[ShapeLinear, _Mapping]]] = ..., columns: _Optional[int] = ..., other: _Optional[int] = ..., head: _Optional[int] = ..., item: _Optional[int] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("base_hash", "matrices", "dense", "mask", "groups", "shapes")
    BASE_HASH_FIELD_NUMBER: _ClassVar[int]
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    base_hash: str
    matrices: _containers.RepeatedCompositeFieldContainer[Matrix]
    dense: _containers.RepeatedCompositeFieldContainer[DenseShape]
    mask: bytes
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    shapes: Shapes
    def __init__(self, base_hash: _Optional[str] = ..., matrices: _Optional[_Iterable[_Union[Matrix, _Mapping]]] = ..., dense: _Optional[_Iterable[_Union[DenseShape, _Mapping]]] = ..., mask: _Optional[bytes] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., shapes: _Optional[_Union[Shapes, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("report", "spec")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    report: DeviceReport
    spec: ModelSpec
    def __init__(self, report: _Optional[_Union[DeviceReport, _Mapping]] = ..., spec: _Optional[_Union[ModelSpec, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("device", "round", "reason", "version", "run", "nonce", "run_hex")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    RUN_HEX_FIELD_NUMBER: _ClassVar[int]
    device: str
    round: int
    reason: str
    version: int
    run: str
    nonce: int
    run_hex: bytes
    def __init__(self, device: _Optional[str] = ..., round: _Optional[int] = ..., reason: _Optional[str] = ..., version: _Optional[int] = ..., run: _Optional[str] = ..., nonce: _Optional[int] = ..., run_hex: _Optional[bytes] = ...) -> None: ...
