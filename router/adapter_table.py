"""Which LoRA adapters requests can name, and which are on their way out. Pure.

               serve                      retire, or another content under the name
    (nobody) ---------> SERVED: by name --------------------------------------------> LEAVING: by id
                           ^                                                             |
                           +--------- serve: the same content again ---------------------+
                                                                                         | its last sequence is over
                                                                                         v
                                                                                     dismissed

Sequences count by id, since a name may stand for another content by the time they end.
"""

from __future__ import annotations

from collections import Counter

from grokmoe.adapter import AdapterInfo
from grokmoe.errors import NotFound

MOST_SHOWN = 20
"""Names in a complaint."""


class AdapterTable:
    """The books of one engine."""

    def __init__(self) -> None:
        self._served: dict[str, AdapterInfo] = {}
        self._leaving: dict[str, AdapterInfo] = {}
        self._num_sequences: Counter[str] = Counter()
        self._dismissed: set[str] = set()

    @property
    def served(self) -> list[AdapterInfo]:
        """What requests can name, in the order of their names."""
        return [self._served[name] for name in sorted(self._served)]

    @property
    def leaving(self) -> list[AdapterInfo]:
        """Those that only requests use that have begun."""
        return list(self._leaving.values())

    def find(self, field: str, name: str) -> AdapterInfo:
        """What a request gets that names it. Raises NotFound with the names there are."""
        info = self._served.get(name)
        if info is None:
            names = sorted(self._served)
            shown = ", ".join(names[:MOST_SHOWN]) + (", ..." if len(names) > MOST_SHOWN else "")
            raise NotFound(f"{field}: there is no adapter {name!r}; loaded: {shown or 'none'}")
        return info

    def get(self, name: str) -> AdapterInfo | None:
        """The same, None if there is none."""
        return self._served.get(name)

    def is_known(self, adapter_id: str) -> bool:
        """Whether sequences may need it."""
        return adapter_id in self._leaving or any(info.id == adapter_id for info in self._served.values())

    def is_dismissed(self, adapter_id: str) -> bool:
        """Whether it was taken out: a worker that still has it should not."""
        return adapter_id in self._dismissed

    def serve(self, info: AdapterInfo) -> AdapterInfo | None:
        """Requests that name it get this from now on. Returns what they got until now, which is leaving, or None."""
        before = self._served.get(info.name)
        self._leaving.pop(info.id, None)
        self._dismissed.discard(info.id)
        self._served[info.name] = info
        if before is None or before.id == info.id:
            return None
        self._leaving[before.id] = before
        return before

    def retire(self, field: str, name: str) -> AdapterInfo:
        """New requests cannot name it any more. Raises NotFound."""
        info = self.find(field, name)
        del self._served[name]
        self._leaving[info.id] = info
        return info

    def dismiss(self, adapter_id: str) -> bool:
        """It has left, if it is still leaving and nobody uses it; False otherwise."""
        if adapter_id not in self._leaving or self._num_sequences[adapter_id]:
            return False
        del self._leaving[adapter_id]
        self._dismissed.add(adapter_id)
        return True

    def is_leaving(self, adapter_id: str) -> bool:
        """Whether it takes no new requests."""
        return adapter_id in self._leaving

    def num_sequences(self, adapter_id: str) -> int:
        """Sequences that are alive with it."""
        return self._num_sequences[adapter_id]

    def add(self, adapter_id: str) -> None:
        """A sequence begins with it."""
        self._num_sequences[adapter_id] += 1

    def release(self, adapter_id: str) -> None:
        """One is over."""
        assert self._num_sequences[adapter_id] > 0, f"adapter {adapter_id} is nobody's"
        self._num_sequences[adapter_id] -= 1

    def check(self, used: Counter[str]) -> None:
        """Asserts that the counts are those of the sequences alive, and that none has an adapter that is gone."""
        assert +self._num_sequences == used, (self._num_sequences, used)
        for adapter_id in used:
            assert self.is_known(adapter_id), f"adapter {adapter_id} is gone and used"
