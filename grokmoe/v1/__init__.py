"""Generated from proto/grokmoe/v1 by `make stubs`; never edited."""
