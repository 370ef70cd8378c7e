"""Models with adapters and data for the demo, the benchmarks and the tests; none needs a network."""
