"""`d2m parity`: a bundle against torch, part by part.

The same latents and embeddings go through both; errors per part leave. Built on polygraphy.

    run               `d2m parity`
    parts             The parts of a parity run: components, blocks, chosen experts, trajectory
    torch_recording   What torch computes, recorded: a diffusers pipeline run once
    tapped_bundle     A bundle whose blocks also return their routers' logits
    quantised_reference  Torch doing the arithmetic of a quantised bundle
    compare           Two ways to compute the same tensors, compared by polygraphy: torch first
    expert_agreement  Which experts a backend chooses, from its routers' logits
"""
