"""The shapes world: coloured shapes that a verifier can judge exactly.

A seed enters; captions, training pictures, batches and verdicts leave.

    world     The shapes world: which scenes exist, how they are captioned
    render    Scenes drawn as images: anti-aliased shapes on grey
    batches   Training and calibration batches for shapes pipelines
    verify    Whether an image shows exactly what a caption says
    edits     Edits of scenes: instructions, what is before and after, which are held out
    edit_batches  Training and calibration batches of edits
    edit_verify   Whether an edited image shows what was asked and keeps the rest
    edit_suite    The editing suite: edit by held-out instructions, verify, count, and show
    suite     The shapes suite: generate from held-out captions, verify each image, count, and show
"""
