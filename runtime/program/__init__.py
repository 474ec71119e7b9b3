"""What every backend shares: the executor's interface and the choice of a backend.

A bundle and a backend's name enter, an opened executor leaves.

    executor        Backends, and the interpreter of block programs that all of them share
    backends        The backends: which there are, what each needs
    residuals       What ControlNets add to a transformer's blocks, and where
    step_cache      Steps whose blocks are left out, because an estimate is near enough
    block_forecast  The block schedule of a whole generation before its first step
    threads         How many threads a CPU backend gets
"""
