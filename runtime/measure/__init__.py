"""`d2m bench` and `d2m measure`: time, memory, latency, expert load of a bundle.

bench         `d2m bench`: cold start, images, steps, blocks and memory of a bundle
bench_facts   What a benchmark says of what it measured: the bundles, their memory, the machine
bench_tables  The answer of `d2m bench` as tables
block_times   Where a step's time goes: every block of a transformer timed by itself
cold_start    A process of its own that opens a bundle and generates one image
latency       A latency budget: how many steps, experts and blocks fit into some seconds
expert_load   How tokens fall on experts: a step of a generation runs once more
"""
