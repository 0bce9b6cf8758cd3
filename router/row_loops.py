"""The compiled loops of gating and dispatch; what they compute is said in `gating` and `dispatch`.

Letters: T tokens, D hidden, E experts, K experts per token, N = T * K rows. With slices E are units, K ranks of slices,
and there are fewer rows than ranks where some are NO_SLICE.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from grokmoe.native import array, as_f32, entry, loop, put, share, wide

NO_SLICE = -1
"""Instead of an expert: nothing is sent for this rank. Instead of a row: nothing has come."""


def compile_all(dtype: torch.dtype) -> None:
    """Makes the loops for a type of rows, so that the first step need not wait for it."""
    gate.compile(dtype)
    plan.compile(torch.float32)
    gather.compile(dtype)
    combine.compile(dtype)


@loop(grain=4)
def gate(element: Any) -> Any:
    """x_TD of `element`, gate_ED -> weights_TK, expert_ids_TK."""

    @entry
    def run(params: Any) -> None:
        T, D, E, K = params[0], params[1], params[2], params[3]
        cap, renormalize = as_f32(np.uint32(params[4])), params[5] != 0
        x_TD, gate_ED = array(element, params[6], (T, D)), array(np.float32, params[7], (E, D))
        weights_TK, ids_TK = array(np.float32, params[8], (T, K)), array(np.int64, params[9], (T, K))
        x_D, chance_E = np.empty(D, np.float32), np.empty(E, np.float64)
        is_taken_E = np.empty(E, np.bool_)
        first, end = share(T)
        for token in range(first, end):
            for i in range(D):
                x_D[i] = wide(x_TD[token, i])
            largest = -np.inf
            for expert in range(E):
                total = np.float32(0.0)
                for i in range(D):
                    total += x_D[i] * gate_ED[expert, i]
                chance_E[expert] = total
                if cap > 0:
                    chance_E[expert] = cap * math.tanh(chance_E[expert] / cap)
                largest = max(largest, chance_E[expert])
            total_chance = 0.0
            for expert in range(E):
                chance_E[expert] = math.exp(chance_E[expert] - largest)
                total_chance += chance_E[expert]
                is_taken_E[expert] = False
            total_chosen = 0.0
            for rank in range(K):
                best = -1
                for expert in range(E):
                    if not is_taken_E[expert] and (best < 0 or chance_E[expert] > chance_E[best]):
                        best = expert
                is_taken_E[best] = True
                ids_TK[token, rank] = best
                total_chosen += chance_E[best]
            divisor = total_chosen if renormalize else total_chance
            for rank in range(K):
                weights_TK[token, rank] = np.float32(chance_E[ids_TK[token, rank]] / divisor)

    return run


@loop(grain=1)
def plan(element: Any) -> Any:
    """ids_TK, slot_E -> counts_E by slot, token_of_row_N, row_of_rank_TK. One thread does it all."""

    @entry
    def run(params: Any) -> None:
        first, end = share(1)
        if first == end:
            return
        T, K, E = params[1], params[2], params[3]
        ids_N, slot_E = array(np.int64, params[4], (T * K,)), array(np.int64, params[5], (E,))
        counts_E, token_N = array(np.int64, params[6], (E,)), array(np.int64, params[7], (T * K,))
        row_N = array(np.int64, params[8], (T * K,))
        for slot in range(E):
            counts_E[slot] = 0
        for n in range(T * K):
            if ids_N[n] >= 0:
                counts_E[slot_E[ids_N[n]]] += 1
        next_E = np.empty(E, np.int64)
        begin = 0
        for slot in range(E):
            next_E[slot] = begin
            begin += counts_E[slot]
        for n in range(T * K):
            if ids_N[n] < 0:
                row_N[n] = NO_SLICE
                continue
            slot = slot_E[ids_N[n]]
            row_N[n] = next_E[slot]
            token_N[next_E[slot]] = n // K
            next_E[slot] += 1

    return run


@loop(grain=16)
def gather(element: Any) -> Any:
    """x_TD, token_of_row_N -> rows_ND."""

    @entry
    def run(params: Any) -> None:
        N, T, D = params[0], params[1], params[2]
        x_TD, token_N = array(element, params[3], (T, D)), array(np.int64, params[4], (N,))
        rows_ND = array(element, params[5], (N, D))
        first, end = share(N)
        for row in range(first, end):
            for i in range(D):
                rows_ND[row, i] = x_TD[token_N[row], i]

    return run


@loop(grain=4)
def combine(element: Any) -> Any:
    """rows_ND of `element`, row_of_rank_TK, weights_TK -> y_TD of `element`."""

    @entry
    def run(params: Any) -> None:
        T, K, D = params[0], params[1], params[2]
        rows_ND, y_TD = array(element, params[3], (T * K, D)), array(element, params[4], (T, D))
        row_TK, weights_TK = array(np.int64, params[5], (T, K)), array(np.float32, params[6], (T, K))
        sum_D = np.empty(D, np.float32)
        first, end = share(T)
        for token in range(first, end):
            for i in range(D):
                sum_D[i] = np.float32(0.0)
            for rank in range(K):
                row, weight = row_TK[token, rank], weights_TK[token, rank]
                if row < 0:
                    continue
                for i in range(D):
                    sum_D[i] += wide(rows_ND[row, i]) * weight
            for i in range(D):
                put(y_TD, token, i, sum_D[i])

    return run
