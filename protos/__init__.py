"""The wire: *.proto files with the stubs made from them. `make protos` makes them again."""
