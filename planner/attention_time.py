"""How long the attention worker's device takes for one step.

products    of qkv and out in every layer, and of the head: c + the longer of
            bytes / (bandwidth e_b) and 2 weights max(rows, tile) / (flops e_f)
attend      layers (a + sequences s + rows queries q) + pages / (bandwidth e_kv) + scores p
rows        layers (o + rows hidden r) + logits l
"""

from __future__ import annotations

from planner.cluster import Cluster
from planner.costs import AttentionCosts
from planner.model_size import head_params, kv_bytes, out_params, qkv_params, weight_bytes
from planner.shape import StepShape


def products_seconds(cluster: Cluster, cost: AttentionCosts, shape: StepShape) -> float:
    """All products with weights."""
    config = cluster.config
    layer = sum(_product(cluster, cost, params(config), shape.rows) for params in (qkv_params, out_params))
    head = _product(cluster, cost, head_params(config), shape.draws) if shape.draws else 0.0
    calls = (2 * config.num_layers + (shape.draws > 0)) * cost.per_product
    return calls * cluster.slowdown(shape.rows) + config.num_layers * layer + head


def _product(cluster: Cluster, cost: AttentionCosts, params: int, rows: int) -> float:
    device = cluster.attention
    rate = device.read_rate(cluster.attention_working_set) * cost.bandwidth
    read = params * weight_bytes(cluster.dtype) / rate
    multiply = 2 * params * max(rows, cost.tile_rows) / (device.peak(cluster.dtype) * cost.flops)
    return max(read, multiply)


def attend_seconds(cluster: Cluster, cost: AttentionCosts, shape: StepShape) -> float:
    """Rotation, pages, scores, softmax, values."""
    config, device = cluster.config, cluster.attention
    layers = config.num_layers
    each = shape.sequences * cost.per_sequence + shape.rows * config.query_size * cost.per_query
    pages = shape.read * kv_bytes(config, cluster.dtype) / (device.bandwidth * cost.kv)
    scores = layers * config.num_heads * shape.attended * cost.per_score / device.parallel
    multiply = 4 * layers * config.query_size * shape.attended / (device.peak(cluster.dtype) * cost.flops)
    calls = layers * (cost.per_attend + each / device.parallel) * cluster.slowdown(shape.rows)
    return calls + pages + max(scores, multiply)


def rows_seconds(cluster: Cluster, cost: AttentionCosts, shape: StepShape) -> float:
    """Norms, residual, copies; drawing."""
    config, parallel = cluster.config, cluster.attention.parallel
    rows = config.num_layers * (cost.per_layer + shape.rows * config.hidden_size * cost.per_element / parallel)
    return rows * cluster.slowdown(shape.rows) + shape.draws * config.vocab_size * cost.per_logit / parallel


def attention_seconds(cluster: Cluster, cost: AttentionCosts, shape: StepShape) -> float:
    """All of it."""
    parts = (products_seconds, attend_seconds, rows_seconds)
    return sum(part(cluster, cost, shape) for part in parts)
