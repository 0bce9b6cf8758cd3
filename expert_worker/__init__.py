"""The expert worker: a stateless function (layer, rows sorted by expert, counts) -> rows.

It holds any set of (expert, layer), joins calls of one layer that wait for the device into one grouped GEMM, and
answers. It does not choose experts, weigh or sum their outputs, keep anything between calls, or call anyone: all that
is the router's.

    config    settings, and which experts a specification means
    weights   checkpoint -> ExpertSet, tensor by tensor
    experts   ExpertSet: the weights held and the forward through them
    kernels/  the arithmetic, per device
    joining   several calls -> one, and the result back
    engine    the queue before the device
    service   gRPC
"""

from grokmoe.process_tuning import tune_process

tune_process()  # before a module of this package loads torch
