"""Where the addresses of workers come from: named one by one, by DNS, or by a file that may change.

    a:1,b:2               static
    dns:///name:port      every address of the name, such as of a headless service
    file:PATH             one address per line, or a JSON list

addresses: lists and what has changed in one; sources: who is asked; watch: `Discovery` asks again and again.
"""

from router.discovery.addresses import Changes, changes, parse_addresses
from router.discovery.sources import Sources
from router.discovery.watch import Discovery

__all__ = ["Changes", "Discovery", "Sources", "changes", "parse_addresses"]
