"""The forms in which checkpoints of this architecture are found, each as tensors by canonical name.

`find` looks at a directory and says which. What a layout gives are `Source`s: tensors whose rows are read one by one,
mapped where they lie and brought into the model's shape and a float type on the way. So every role reads its slice from
any of them, and `grokmoe checkpoint convert` is nothing but reading and writing.
"""

from grokmoe.layouts.finding import find, nothing_found
from grokmoe.layouts.layout import Layout
from grokmoe.layouts.source import Source

__all__ = ["Layout", "Source", "find", "nothing_found"]
