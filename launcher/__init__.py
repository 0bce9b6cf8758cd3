"""Composition roots and the `grokmoe` command. The only package that knows all roles."""
