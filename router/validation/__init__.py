"""From messages to requests: every value checked, every default applied, nothing ignored, before anything is done."""

from router.validation.prompt import PromptReader
from router.validation.reader import Accepted, RequestReader

__all__ = ["Accepted", "PromptReader", "RequestReader"]
