"""The emoji world: 1,000 pictures to remember by name, judged by the nearest of all.

A seed enters, and a folder of pictures; captions, training images, batches and verdicts leave.

    art       The pictures: found, fetched, unpacked
    choice    Which emoji the world has, and by which names
    world     Which scenes exist, how they are captioned, which are held out
    render    Scenes drawn as images
    batches   Training and calibration batches for emoji pipelines
    verify    Whether an image shows what a caption says
    suite     The emoji suite: generate from held-out captions, judge each image, count, and show
"""
