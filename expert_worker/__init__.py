"""The expert worker: a stateless function (layer, rows sorted by expert, counts) -> rows.

It holds any set of (expert, layer), or of slices of experts (`grokmoe.expert_units`), joins calls of one layer that
wait for the device into one grouped GEMM, and answers. It loads and gives up experts when it is told to. It does not
choose experts, weigh or sum their outputs, keep anything between calls, or call anyone: all that is the router's.

    config          settings
    cells           (layer, unit): what is held one by one
    holdings        what is held, being loaded, given up: the table and its rules
    weights         checkpoint -> ExpertSet, tensor by tensor
    loader          the same and the reverse while it serves; room: memory; range_check: what a caller may ask for
    experts         ExpertSet: what is held, and what a call may use
    layers          the weights of one layer in the layout of their kernel; mixed_layer: of slices of several widths
    kernels/        the arithmetic, per device
    joining         several calls -> one, and the result back
    engine          the queue before the device
    service         gRPC; forward_stream: one stream of it, pair_end: rows beside it
"""

from grokmoe.process_tuning import tune_process

tune_process()  # before a module of this package loads torch
