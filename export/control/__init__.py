"""ControlNets: exported block by block to bundles of their own, which any bundle of a fitting
model generates with.

A directory as diffusers saves a ControlNet enters, with the bundle that it is to control; a bundle
of kind "controlnet" leaves.

    bundle    `d2m export CONTROLNET --base BUNDLE`
    program   A ControlNet as a program: blocks as in its transformer, a residual behind each
    flux      FLUX.1's ControlNets, and unions of several kinds, for export
    sd3       Stable Diffusion 3's and 3.5's ControlNets for export
"""
