"""What the image adds to the packages: one entry point for all roles, and the small programs that pods run before them.

placement: ordinal -> experts; weights: a checkpoint over HTTP, checked; names: waits for pods; triton_driver: what
Triton would compile with a C compiler at run time. All of it is the standard library, and imports nothing of the roles.
"""
