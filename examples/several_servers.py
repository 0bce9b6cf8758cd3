"""Several servers of one model, in turns, with TLS and a token where the servers ask for them."""

import argparse
from pathlib import Path

from grokmoe import Client, TlsConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="host:port,host:port or dns:///name:port")
parser.add_argument("--ca", metavar="FILE", help="certificates of who vouches for the servers; without it no TLS")
parser.add_argument("--server-name", help="name in the servers' certificates, for a list of addresses")
parser.add_argument("--token-file", metavar="FILE", help="what proves who we are; read anew for every call")
arguments = parser.parse_args()

tls = TlsConfig(ca=arguments.ca, server_name=arguments.server_name) if arguments.ca else None
token = Path(arguments.token_file).read_text if arguments.token_file else None

with Client(arguments.address, tls=tls, token=token, metadata={"x-team": "examples"}) as client:
    client.wait_ready(timeout=30)
    for number in range(4):
        # A server that is not healthy is left out; a call that a server lost is tried again on another.
        print(f"{number}: {client.generate('HAMLET.', max_tokens=8, seed=number).text!r}")
