"""Training data: folders, WebDataset, Hugging Face datasets, prompts alone.

What the user wrote after `--data` enters, batches leave, the same for a seed and resumable at any
step.

    option          What `--data` means: the shapes world, prompts alone
    source          A source of training data: named shards of samples that are read when asked for
    folder          Pictures in a folder, captions in metadata.jsonl or a .txt file beside each
    webdataset      WebDataset shards: tar files of pictures and captions
    hub             Datasets of the `datasets` library, streamed: by name on the Hugging Face hub
    shuffle         The order in which a source's samples are seen: shuffled by seed, without end
    samples         Samples for a batch, by its place in a run: read, decoded
    pixels          The file of a picture as pixels of the size that a model is trained at
    encodings       Pictures and captions as a transformer takes them
    pairs           Pictures before and after an edit as an editor's transformer takes them
    encoding_cache  Encodings kept in a directory, so that a picture or a caption is encoded once
    trajectories    Data-free training data: latents that the dense model makes itself
"""
