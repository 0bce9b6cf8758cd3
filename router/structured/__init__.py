"""Structured output: only tokens that keep to a JSON schema, regular expression, grammar or list can be drawn.

`GrammarCompiler` turns text into a `Grammar`; `Grammar.start` gives each candidate a `Matcher`, whose mask goes to the
sampler. Nothing outside this package imports the library behind it (docs/decisions/0006-structured-output.md).
"""

from router.structured.compiler import Format, GrammarCompiler
from router.structured.matcher import Grammar, Matcher

__all__ = ["Format", "Grammar", "GrammarCompiler", "Matcher"]
