"""The executor on TensorRT and TensorRT-RTX plans.

Plans and weights enter; launches are worked out as data, then run on one stream.

    component        TensorRT and TensorRT-RTX: a component as launches of compiled plans
    plan_choice      Which of a bundle's plans runs here
    plan_loader      Plan files made executable by TensorRT or TensorRT-RTX
    launch_schedule  What a program of plans does on a device, worked out without one: pure data
    launches         What a program of plans consists of: launches, copies of rows
    launcher         Launches of plans with everything bound: contexts, addresses, shapes
    experts          The routed experts between a block's segments
    expert_kernels   The routed experts as launches of cubins: worked out as data
"""
