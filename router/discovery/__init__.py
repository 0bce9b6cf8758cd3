"""Where the addresses of workers come from: named one by one, by DNS, or by a file that may change.

    a:1,b:2               static
    a:1+b:1,c:1+d:1       attention workers that make two pipelines; also in a file
    dns:///name:port      every address of the name, such as of a headless service
    file:PATH             one address per line, or a JSON list

addresses: lists and what has changed in one; sources: who is asked; watch: `Discovery` asks again and again.
"""

from router.discovery.addresses import STAGE_JOINT, Changes, changes, parse_addresses, pipelines, stages_of
from router.discovery.sources import Sources
from router.discovery.watch import Discovery

__all__ = ["STAGE_JOINT", "Changes", "Discovery", "Sources", "changes", "parse_addresses", "pipelines", "stages_of"]
