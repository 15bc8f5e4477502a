"""Two network namespaces, a server and a client: for the demo, the tests and the benches."""
