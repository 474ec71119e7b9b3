"""The executor on TensorRT and TensorRT-RTX plans.

Plans and weights enter; launches are worked out as data, then run on one stream.

    component        TensorRT and TensorRT-RTX: a component as launches of compiled plans, weights
                     bound by prefix
    plan_choice      Which of a bundle's plans runs here: decided from the manifest before anything
                     is loaded
    plan_loader      Plan files made executable by TensorRT or TensorRT-RTX (both have the same
                     Python interface)
    launch_schedule  What a program of plans does on a device, worked out without one: pure data,
                     tested on a CPU
    launches         What a program of plans consists of: launches, copies of rows, and pieces of
                     the program
    launcher         Launches of plans with everything bound: contexts, addresses, shapes, working
                     memory, recordings
    experts          The routed experts between a block's segments, launched as if they were one
                     more plan
    expert_kernels   The routed experts as launches of cubins: worked out as data, then run on a
                     device's stream
"""
