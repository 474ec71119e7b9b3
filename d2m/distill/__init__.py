"""Distillation: the student learns from its dense teacher.

Two models, batches and a recipe's stages enter; the trained student, a log and checkpoints leave.
Read `loop` first; it calls the others.

    loop         Distillation: the student learns from its dense teacher, stage after stage
    learner      What learns in a stage of distillation: parameters, AdamW
    loss_terms   What a step of distillation learns from: the terms of the loss
    losses       The terms of the distillation loss
    features     What a transformer's blocks put out, caught by forward hooks
    checkpoint   Training state on disk: safetensors and JSON, whole or not at all
    log          The log of a distillation: one JSON object per line in `log.jsonl`
    stopping     Ctrl-C and SIGTERM in a long run: the first stops at the next checkpoint
    activations  What a forward pass keeps for the backward one: all of it
    batch_rows   Which rows of a batch a process runs, one part after another
    processes    The processes of one run, as torchrun or accelerate starts them: who we are
    sharding     Student and teacher spread over the processes of a run with FSDP2 (`fully_shard`)
    gather       Parts of sharded tensors and the whole of them: gathered, handed out, written
"""
