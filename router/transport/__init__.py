"""How the router reaches its workers: an interface (base) and its implementations: local; grpc; pair, which is
grpc with rows beside it."""
