"""The shapes world: coloured shapes that a verifier can judge exactly.

A seed enters; captions, training pictures, batches and verdicts leave.

    world     The shapes world: which scenes exist, how they are captioned, which are held out for
              evaluation
    render    Scenes drawn as images: anti-aliased shapes on grey, placed at random without
              touching
    batches   Training and calibration batches for shapes pipelines: captioned scenes as models see
              them
    verify    Does an image show exactly what a caption says? Written from the scenes' definition
              alone
    suite     The shapes suite: draw held-out captions, verify each image, count, and show
"""
